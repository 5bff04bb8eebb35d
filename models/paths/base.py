"""What a path between noise and data is, x_t = alpha(t) x + sigma(t) noise, and what the network predicts on it.

A path is its schedule (alpha, sigma and their derivatives) and its kind of prediction; everything else follows:
conversions between predictions of data, noise, velocity and score, log-SNR, losses. Time runs in different directions
on different paths, so "noisy" or "early" always refers to log-SNR, never to t.
"""

from abc import ABC, abstractmethod
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor

from models.choice import NameOf
from models.paths.timesteps import TIMESTEPS


class PathConfig(BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True):
    """Which path, which timesteps in training, and how they are weighted. A name alone stands for the path as
    published."""

    default_timesteps: ClassVar[str] = "uniform"
    steps: ClassVar[int | None] = None  # the number of steps, if times are step numbers; None: times are continuous

    name: str = Field("linear", json_schema_extra={"keys_of": "models.paths.registry:PATHS"})
    """The path between noise and data. linear, gvp and vp are SiT's, ddpm is DiT's, jit is JiT's."""
    timesteps: Annotated[str, NameOf(TIMESTEPS)] | None = None
    """Distribution of timesteps in training. null: as published for the path."""
    logit_mean: float = -0.8
    """Of timesteps=logit_normal: mean of logit(t), where t = 1 is data."""
    logit_std: float = Field(0.8, gt=0)
    """Of timesteps=logit_normal: standard deviation of logit(t)."""
    min_snr: float | None = Field(None, gt=0)
    """Weight the loss, as an error of the data, by min(SNR, this value). null: no weighting."""

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("timesteps") is None:
            return {**values, "timesteps": cls.default_timesteps}
        return values

    @model_validator(mode="after")
    def _check(self) -> "PathConfig":
        fitting = [name for name, kind in TIMESTEPS.items() if kind.numbered == (self.steps is not None)]
        if self.timesteps not in fitting:
            fix = " or ".join(fitting)
            raise ValueError(f"timesteps={self.timesteps}: not with name={self.name}; set {fix}")
        return self

    @property
    def predictions(self) -> int:
        """Number of values that the network predicts for each value of an image."""
        return 1

    def same_form(self, other: "PathConfig") -> bool:
        """Return whether a network trained on one path can be used on the other: same name and same own fields."""
        own = {"name", *type(self).model_fields} - ({*PathConfig.model_fields} - {"name"})
        return type(self) is type(other) and all(getattr(self, name) == getattr(other, name) for name in own)


class Schedule(NamedTuple):
    """alpha, sigma, d alpha / dt, d sigma / dt at some times, shaped like the times."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor


class NoisePath(ABC):
    """A path whose network predicts the velocity alpha' x + sigma' noise. Images are (B, C, H, W), times (B,).

    Sampling runs from time `noisiest` to time `cleanest`; `singular` means that the velocity is infinite at the latter.
    In training, times go up to `latest`. `offers` says what a prediction can be converted to for a sampler: velocity,
    score, data, noise, or (by `reverse`) the posterior of a step. `Config` has the path's fields, its default
    timesteps, and whether its times are numbered steps.
    """

    Config: ClassVar[type[PathConfig]] = PathConfig
    offers: ClassVar[frozenset[str]] = frozenset({"velocity", "score", "data", "noise"})
    noisiest, cleanest, latest = 0.0, 1.0, 1.0
    singular = False

    def __init__(self, config: Any = None) -> None:
        self.config: Any = self.Config.model_validate({}) if config is None else config

    @property
    def name(self) -> str:
        """Name of the path in a config."""
        return self.config.name

    @abstractmethod
    def schedule(self, t: Tensor) -> Schedule:
        """Return the schedule at times t, in float64, elementwise."""

    def at(self, t: Tensor, like: Tensor) -> Schedule:
        """Return the schedule at times (B,), as factors for images `like`."""
        return Schedule(*(part.to(like.dtype).view(-1, 1, 1, 1) for part in self.schedule(t)))

    def timestep(self, u: Tensor, position: int = 0) -> Tensor:
        """Return training times, given quantiles `u` (B,) and the number of images seen before the step."""
        return self.time_at(TIMESTEPS[str(self.config.timesteps)].share(u, position, self.config))

    def time_at(self, share: Tensor) -> Tensor:
        """Return the time below which the given share (B,) of the path's times lies."""
        return share * self.latest

    def even_times(self, steps: int) -> list[float]:
        """Return the times of the given number of equal steps, from the noise to the data. Raise ValueError if the path
        does not have that many."""
        return torch.linspace(self.noisiest, self.cleanest, steps + 1, dtype=torch.float64).tolist()

    def start(self, noise: Tensor) -> Tensor:
        """Return what sampling starts from, given standard normal noise."""
        return noise

    def log_snr(self, t: Tensor) -> Tensor:
        """Return log(alpha^2 / sigma^2), float64, elementwise; infinite where there is no noise, or only noise."""
        alpha, sigma, *_ = self.schedule(t)
        return 2 * (alpha.log() - sigma.log())

    def noisy(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return x_t."""
        alpha, sigma, *_ = self.at(t, x)
        return alpha * x + sigma * noise

    def target(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return what the network should predict."""
        *_, d_alpha, d_sigma = self.at(t, x)
        return d_alpha * x + d_sigma * noise

    def velocity(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return dx_t/dt, which ODE samplers integrate."""
        return prediction

    def data(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the clean image that a prediction implies."""
        alpha, sigma, d_alpha, d_sigma = self.at(t, x_t)
        return (sigma * prediction - d_sigma * x_t) / (d_alpha * sigma - d_sigma * alpha)

    def noise(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the noise that a prediction implies."""
        alpha, sigma, d_alpha, d_sigma = self.at(t, x_t)
        return (d_alpha * x_t - alpha * prediction) / (d_alpha * sigma - d_sigma * alpha)

    def score(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the gradient of the log-density of x_t, -noise / sigma."""
        return -self.noise(prediction, x_t, t) / self.at(t, x_t).sigma

    def error(self, prediction: Tensor, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the difference that the loss squares."""
        return prediction - self.target(x, noise, t)

    def data_error(self, t: Tensor) -> Tensor:
        """Return the error of the data that corresponds to an `error` of 1; float64, elementwise."""
        alpha, sigma, d_alpha, d_sigma = self.schedule(t)
        return 1 / (d_alpha - d_sigma * alpha / sigma)

    def loss(self, prediction: Tensor, x: Tensor, noise: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the squared error of a prediction (fp32), averaged over each image: (B,). With `min_snr`, return the
        squared error of the data times min(SNR, min_snr) (Hang et al., arXiv 2303.09556, sec. 3.4)."""
        loss = mean_of_image(self.error(prediction, x, noise, t).square())
        if self.config.min_snr is None:
            return loss
        weight = self.log_snr(t).exp().clamp(max=self.config.min_snr) * self.data_error(t).square()
        return weight.to(loss.dtype) * loss


def quantile_at(path: NoisePath, log_snr: float) -> tuple[float, float]:
    """Return the quantile of the path's timesteps whose log-SNR is nearest to this one, and its log-SNR."""
    u = torch.linspace(-16, 16, 3201).sigmoid()  # as fine at both ends as float32 allows
    found = path.log_snr(path.timestep(u))
    nearest = (found - log_snr).abs().argmin()
    return float(u[nearest]), float(found[nearest])


def mean_of_image(x: Tensor) -> Tensor:
    """Return the mean of each image, (B, ...) -> (B,)."""
    return x.flatten(1).mean(dim=1)
