"""DDPM's path as in DiT: 1,000 steps with linear beta, predicted noise and learned variance (Ho et al., arXiv
2006.11239; Nichol & Dhariwal, arXiv 2102.09672)."""

import math

import torch
from torch import Tensor

from models.paths.base import NoisePath, PathConfig, Schedule, mean_of_image

STEPS = 1000


class DDPM(NoisePath):
    """DDPM's path. t is the number of a step: 0 is almost data, 999 almost noise, -1 the data itself. The network
    predicts the noise and, in as many additional channels, where the log-variance of a step lies between its bounds
    (-1: lower, 1: upper).

    The velocity is with respect to the angle: alpha noise - sigma x (Salimans & Ho, arXiv 2202.00512, app. D). The
    schedule has no derivatives, so ODE and SDE samplers do not apply.
    """

    class Config(PathConfig, frozen=True):
        """Which path, which timesteps in training, and how they are weighted."""

        default_timesteps = "discrete"
        steps = STEPS

        name: str = "ddpm"
        """The path between noise and data."""
        learns_variance: bool = True
        """Whether the network also predicts the variance of a step."""

        @property
        def predictions(self) -> int:
            """2 if the network learns the variance, otherwise 1."""
            return 2 if self.learns_variance else 1

    config: Config
    offers = frozenset({"score", "data", "noise", "posterior"})
    noisiest, cleanest = STEPS - 1.0, -1.0

    def __init__(self, config: Config | None = None) -> None:
        super().__init__(config)
        beta = torch.linspace(1e-4, 0.02, STEPS, dtype=torch.float64)
        self._alpha_bar = torch.cat([torch.ones(1, dtype=torch.float64), (1 - beta).cumprod(0)])
        self._on_device: dict[torch.device, Tensor] = {}

    def alpha_bar(self, t: Tensor) -> Tensor:
        """Return alpha^2 of steps t, from -1 up, float64."""
        if t.device not in self._on_device:
            self._on_device[t.device] = self._alpha_bar.to(t.device)  # only once: the host waits for this copy
        return self._on_device[t.device][t.long() + 1]

    def schedule(self, t: Tensor) -> Schedule:
        """Return alpha = sqrt(alpha_bar) and sigma = sqrt(1 - alpha_bar); the derivatives are undefined."""
        alpha_bar = self.alpha_bar(t)
        undefined = torch.full_like(alpha_bar, math.nan)
        return Schedule(alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), undefined, undefined)

    def time_at(self, share: Tensor) -> Tensor:
        """Return whole numbers from 0 to 999, each for an equal part of the shares."""
        return (share * STEPS).floor().clamp(max=STEPS - 1)

    def even_times(self, steps: int) -> list[float]:
        """Return `steps` of the 1,000 steps, evenly spaced from 999 to 0, followed by -1, the data (arXiv 2102.09672,
        sec. 4)."""
        if not 2 <= steps <= STEPS:
            raise ValueError(f"sample.steps={steps}: the path ddpm has {STEPS} steps; set 2 to {STEPS}")
        return [*torch.linspace(STEPS - 1, 0, steps, dtype=torch.float64).round().tolist(), -1.0]

    def velocity(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return alpha noise - sigma x."""
        alpha, sigma, *_ = self.at(t, x_t)
        return alpha * self.noise(prediction, x_t, t) - sigma * self.data(prediction, x_t, t)

    def data(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return (x_t - sigma noise) / alpha."""
        alpha, sigma, *_ = self.at(t, x_t)
        return (x_t - sigma * self.noise(prediction, x_t, t)) / alpha

    def noise(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the prediction without its variance channels."""
        return prediction[:, : x_t.shape[1]]

    def target(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the noise."""
        return noise

    def error(self, prediction: Tensor, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the error of the noise."""
        return self.noise(prediction, x, t) - noise

    def data_error(self, t: Tensor) -> Tensor:
        """Return -sigma / alpha."""
        alpha, sigma, *_ = self.schedule(t)
        return -sigma / alpha

    def loss(self, prediction: Tensor, x: Tensor, noise: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return L_simple, plus 0.001 L_vlb of 1,000 steps if the variance is learned (arXiv 2102.09672, eq. 16)."""
        simple = super().loss(prediction, x, noise, x_t, t)
        return simple + self.bound(prediction, x, x_t, t) if self.config.learns_variance else simple

    def bound(self, prediction: Tensor, x: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return one step's term of the variational bound (arXiv 2006.11239, eq. 5), (B,), in bits per value: the KL
        divergence between the true posterior and the model's; at step 0, the negative log-likelihood of x with 8 bits
        (eq. 13). Its gradient trains only the variance."""
        channels = x.shape[1]
        frozen = torch.cat([prediction[:, :channels].detach(), prediction[:, channels:]], dim=1)
        true_mean, true_log_variance, _ = self.posterior(x, x_t, t, t - 1)
        mean, log_variance = self.reverse(frozen, x_t, t, t - 1)
        ratio = true_log_variance - log_variance
        kl = 0.5 * (ratio.exp() - ratio - 1 + (true_mean - mean).square() * (-log_variance).exp())
        likelihood = _log_probability_of_bin(x, mean, 0.5 * log_variance)
        return torch.where(t < 1, -mean_of_image(likelihood), mean_of_image(kl)) / math.log(2)

    def posterior(self, x: Tensor, x_t: Tensor, t: Tensor, before: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the mean and log-variance of q(x_before | x, x_t), and log beta, the upper bound of a learned
        log-variance (arXiv 2006.11239, eq. 7). `before` (B,) may be any earlier step, as in respaced sampling.

        The variance of a step to the data would be 0; use that of step 1 instead, as in the public code.
        """
        bar, bar_before = self.alpha_bar(t), self.alpha_bar(before)
        beta = 1 - bar / bar_before
        share = (1 - bar_before) / (1 - bar)
        of_data, of_noisy = bar_before.sqrt() * beta / (1 - bar), (bar / bar_before).sqrt() * share
        one, two = self._alpha_bar[1:3]
        variance = torch.where(before < 0, float((1 - two / one) * (1 - one) / (1 - two)), beta * share)
        parts = (of_data, of_noisy, variance.log(), beta.log())
        of_data, of_noisy, log_variance, log_beta = (part.to(x_t.dtype).view(-1, 1, 1, 1) for part in parts)
        return of_data * x + of_noisy * x_t, log_variance, log_beta

    def reverse(self, prediction: Tensor, x_t: Tensor, t: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and log-variance of the model's step from t to `before` (arXiv 2102.09672, eq. 15)."""
        mean, lower, upper = self.posterior(self.data(prediction, x_t, t), x_t, t, before)
        if not self.config.learns_variance:
            return mean, lower
        share = (prediction[:, x_t.shape[1] :] + 1) / 2
        return mean, share * upper + (1 - share) * lower


def _log_probability_of_bin(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Return the log-probability, under a Gaussian, of the bin of width 2 / 255 around x in [-1, 1]; the outermost bins
    are unbounded. The distribution function is the public code's approximation (Page 1977), not the exact one."""
    above, below = (_normal_cdf((x - mean + side / 255) * (-log_std).exp()) for side in (1, -1))
    inner = torch.where(x > 0.999, 1 - below, above - below)
    return torch.where(x < -0.999, above, inner).clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    """Return the distribution function of the standard normal distribution, within 2e-4 of the exact one."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
