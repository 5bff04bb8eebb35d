"""Flow paths: SiT's three (Ma et al., arXiv 2401.08740) in the direction of its code, where t = 0 is noise and t = 1 is
data, and JiT's."""

import math

import torch
from pydantic import Field
from torch import Tensor

from models.paths.base import NoisePath, PathConfig, Schedule


class LinearFlow(NoisePath):
    """x_t = t x + (1 - t) noise; the network predicts the velocity x - noise."""

    def schedule(self, t: Tensor) -> Schedule:
        """Return alpha = t, sigma = 1 - t."""
        t = t.double()
        return Schedule(t, 1 - t, torch.ones_like(t), -torch.ones_like(t))


class GVP(NoisePath):
    """The generalised variance-preserving path (arXiv 2401.08740, sec. 2.4)."""

    class Config(PathConfig, frozen=True):
        """Which path, which timesteps in training, and how they are weighted."""

        name: str = "gvp"
        """The path between noise and data."""

    def schedule(self, t: Tensor) -> Schedule:
        """Return alpha = sin(pi t / 2), sigma = cos(pi t / 2)."""
        angle = math.pi / 2 * t.double()
        alpha, sigma = angle.sin(), (math.pi / 2 - angle).sin()  # exactly 0 at the data, unlike angle.cos()
        return Schedule(alpha, sigma, math.pi / 2 * sigma, -math.pi / 2 * alpha)


class VP(NoisePath):
    """The variance-preserving path of Song et al. (arXiv 2011.13456, eq. 33). Its velocity is infinite at the data, so
    training and sampling end slightly before it, as in SiT."""

    class Config(PathConfig, frozen=True):
        """Which path, which timesteps in training, and how they are weighted."""

        name: str = "vp"
        """The path between noise and data."""

    cleanest, latest = 1 - 1e-3, 1 - 1e-5
    beta_min, beta_max = 0.1, 20.0

    def schedule(self, t: Tensor) -> Schedule:
        """Return alpha = exp(-s^2 (beta_max - beta_min) / 4 - s beta_min / 2), s = 1 - t."""
        s, span = 1 - t.double(), self.beta_max - self.beta_min
        beta = self.beta_min + s * span
        log_alpha = -0.25 * s**2 * span - 0.5 * s * self.beta_min
        alpha, sigma = log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()
        return Schedule(alpha, sigma, 0.5 * beta * alpha, -0.5 * beta * alpha**2 / sigma)


class JiTFlow(LinearFlow):
    """JiT's path (Li & He, arXiv 2511.13720): the linear path with scaled noise. The network predicts the data; the
    loss compares velocities, computed with 1 - t clamped to at least 0.05.

    The public code also clamps in sampling, which leaves about 1 % of the noise in the images. We do not: the last step
    goes to the predicted data.
    """

    class Config(PathConfig, frozen=True):
        """Which path, which timesteps in training, and how they are weighted."""

        default_timesteps = "logit_normal"

        name: str = "jit"
        """The path between noise and data."""
        noise_scale: float = Field(1.0, gt=0)
        """Standard deviation of the noise; the published value for 512 pixels is 2."""

    config: Config
    singular = True
    floor = 0.05

    def schedule(self, t: Tensor) -> Schedule:
        """Return alpha = t, sigma = noise_scale (1 - t)."""
        alpha, sigma, d_alpha, d_sigma = super().schedule(t)
        return Schedule(alpha, self.config.noise_scale * sigma, d_alpha, self.config.noise_scale * d_sigma)

    def start(self, noise: Tensor) -> Tensor:
        """Return the noise, scaled as on the path."""
        return self.config.noise_scale * noise

    def velocity(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return (x - x_t) / (1 - t)."""
        return (prediction - x_t) * self.config.noise_scale / self.at(t, x_t).sigma

    def data(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the prediction itself."""
        return prediction

    def noise(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return (x_t - alpha x) / sigma."""
        alpha, sigma, *_ = self.at(t, x_t)
        return (x_t - alpha * prediction) / sigma

    def target(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the clean image."""
        return x

    def error(self, prediction: Tensor, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the error of the velocity."""
        return (prediction - x) / self.data_error(t).to(x.dtype).view(-1, 1, 1, 1)

    def data_error(self, t: Tensor) -> Tensor:
        """Return 1 - t, but at least 0.05."""
        return (1 - t.double()).clamp(min=self.floor)
