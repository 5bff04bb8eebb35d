"""What a path between noise and data is: x_t = alpha(t) x + sigma(t) noise, and what the network predicts on it.

A path is its schedule (alpha, sigma and their derivatives) and its kind of prediction; all else follows: conversions
between predictions of data, noise, velocity and score, log-SNR, losses. Paths run time in different directions;
whatever says "noisy" or "early" therefore speaks of log-SNR, never of t.
"""

from typing import Literal, NamedTuple

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor


class PathConfig(BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True):
    """Which path, which timesteps in training, and how they are weighted. A name alone stands for it as published."""

    name: Literal["linear", "gvp", "vp", "jit", "ddpm"] = "linear"
    """The path between noise and data. linear, gvp and vp are SiT's, ddpm is DiT's, jit is JiT's."""
    timesteps: Literal["uniform", "logit_normal", "discrete"] | None = None
    """Distribution of timesteps in training. null: as published for the path."""
    logit_mean: float = -0.8
    """Of timesteps=logit_normal: mean of logit(t), where t = 1 is data."""
    logit_std: float = Field(0.8, gt=0)
    """Of timesteps=logit_normal: standard deviation of logit(t)."""
    min_snr: float | None = Field(None, gt=0)
    """Weigh the loss, as an error of the data, by min(SNR, this value). null: no weighting."""
    learns_variance: bool = True
    """Of ddpm: whether the network also predicts the variance of a step."""
    noise_scale: float = Field(1.0, gt=0)
    """Of jit: standard deviation of the noise; 2 is published for 512 pixels."""

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: dict | str) -> dict | str:
        values = {"name": values} if isinstance(values, str) else values
        if isinstance(values, dict) and values.get("timesteps") is None:
            usual = {"jit": "logit_normal", "ddpm": "discrete"}.get(str(values.get("name")), "uniform")
            return {**values, "timesteps": usual}
        return values

    @model_validator(mode="after")
    def _check(self) -> "PathConfig":
        if (self.timesteps == "discrete") != (self.name == "ddpm"):
            fix = "discrete" if self.name == "ddpm" else "uniform or logit_normal"
            raise ValueError(f"timesteps={self.timesteps}: not with name={self.name}; set {fix}")
        if self.noise_scale != 1 and self.name != "jit":
            raise ValueError(f"noise_scale={self.noise_scale}: is for name=jit; leave it out")
        return self


class Schedule(NamedTuple):
    """alpha, sigma, d alpha / dt, d sigma / dt at some times, shaped like them."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor


class NoisePath:
    """A path whose network predicts the velocity alpha' x + sigma' noise. Images are (B, C, H, W), times (B,).

    It is sampled from time `noisiest` to time `cleanest`; `singular`: at the latter the velocity is infinite. In
    training, times go up to `latest`.
    """

    name = ""
    noisiest, cleanest, latest = 0.0, 1.0, 1.0
    singular = False

    def __init__(self, config: PathConfig | None = None) -> None:
        self.config = config or PathConfig(name=self.name)

    def schedule(self, t: Tensor) -> Schedule:
        """In float64, elementwise."""
        raise NotImplementedError

    def at(self, t: Tensor, like: Tensor) -> Schedule:
        """The schedule at times (B,), as factors of images `like`."""
        return Schedule(*(part.to(like.dtype).view(-1, 1, 1, 1) for part in self.schedule(t)))

    def timestep(self, uniform: Tensor, position: int = 0) -> Tensor:
        """Times as training has them, from numbers uniform in [0, 1], by their quantiles."""
        if self.config.timesteps == "logit_normal":
            uniform = logit_normal(uniform, self.config.logit_mean, self.config.logit_std)
        return uniform * self.latest

    def log_snr(self, t: Tensor) -> Tensor:
        """log(alpha^2 / sigma^2), float64, elementwise; infinite where there is no noise, or nothing else."""
        alpha, sigma, *_ = self.schedule(t)
        return 2 * (alpha.log() - sigma.log())

    def noisy(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t."""
        alpha, sigma, *_ = self.at(t, x)
        return alpha * x + sigma * noise

    def target(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should predict."""
        *_, d_alpha, d_sigma = self.at(t, x)
        return d_alpha * x + d_sigma * noise

    def velocity(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """dx_t/dt, which ODE samplers integrate."""
        return prediction

    def data(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The clean image that a prediction stands for."""
        alpha, sigma, d_alpha, d_sigma = self.at(t, x_t)
        return (sigma * prediction - d_sigma * x_t) / (d_alpha * sigma - d_sigma * alpha)

    def noise(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The noise that a prediction stands for."""
        alpha, sigma, d_alpha, d_sigma = self.at(t, x_t)
        return (d_alpha * x_t - alpha * prediction) / (d_alpha * sigma - d_sigma * alpha)

    def score(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The gradient of the log-density of x_t: -noise / sigma."""
        return -self.noise(prediction, x_t, t) / self.at(t, x_t).sigma

    def error(self, prediction: Tensor, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The difference that the loss squares."""
        return prediction - self.target(x, noise, t)

    def data_error(self, t: Tensor) -> Tensor:
        """The error of the data that an `error` of 1 stands for; float64, elementwise."""
        alpha, sigma, d_alpha, d_sigma = self.schedule(t)
        return 1 / (d_alpha - d_sigma * alpha / sigma)

    def loss(self, prediction: Tensor, x: Tensor, noise: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Squared error of a prediction (fp32), averaged over each image: (B,). With `min_snr` it is the data's, times
        min(SNR, min_snr) (Hang et al., arXiv 2303.09556, sec. 3.4)."""
        loss = mean_of_image(self.error(prediction, x, noise, t).square())
        if self.config.min_snr is None:
            return loss
        weight = self.log_snr(t).exp().clamp(max=self.config.min_snr) * self.data_error(t).square()
        return weight.to(loss.dtype) * loss


def share_at(path: NoisePath, log_snr: float) -> tuple[float, float]:
    """The share of the path's distribution of timesteps with the log-SNR nearest to this one; and that log-SNR."""
    shares = torch.linspace(-16, 16, 3201).sigmoid()  # as fine at both ends as float32 is
    found = path.log_snr(path.timestep(shares))
    nearest = (found - log_snr).abs().argmin()
    return float(shares[nearest]), float(found[nearest])


def mean_of_image(x: Tensor) -> Tensor:
    """(B, ...) -> (B,)."""
    return x.flatten(1).mean(dim=1)


def logit_normal(uniform: Tensor, mean: float, std: float) -> Tensor:
    """Numbers whose logit is normal, from uniform ones, by their quantiles."""
    edge = 2.0**-33  # below the spacing of the numbers: what is 0 or 1 stays finite
    return torch.sigmoid(mean + std * torch.special.ndtri(uniform.double().clamp(edge, 1 - edge))).to(uniform.dtype)
