"""Paths between noise and data: how a noisy image is made, and what the network predicts from it.

Every path has these four functions, so that objective, samplers and guidance work with any of them. Paths run time in
different directions; whatever says "noisy" or "early" therefore speaks of log-SNR, never of t.
"""

from typing import Protocol

import torch
from torch import Tensor


class Path(Protocol):
    """x_t from data x, noise and time t (B,); all images (B, C, H, W)."""

    def noisy(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor: ...

    def target(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor: ...

    def log_snr(self, t: Tensor) -> Tensor: ...

    def velocity(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor: ...


class LinearFlow:
    """SiT's linear path (Ma et al., arXiv 2401.08740, sec. 2, in its code's direction): t = 0 is noise, t = 1 is data.

    x_t = t x + (1 - t) noise; the network predicts the velocity dx_t/dt = x - noise.
    """

    def noisy(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        t = t.view(-1, 1, 1, 1)
        return t * x + (1 - t) * noise

    def target(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return x - noise

    def log_snr(self, t: Tensor) -> Tensor:
        """log(alpha^2 / sigma^2) = 2 log(t / (1 - t)), elementwise; -inf at t = 0, inf at t = 1."""
        return 2 * torch.logit(t.double())

    def velocity(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """dx_t/dt, which an ODE sampler integrates: here the prediction itself."""
        return prediction


PATHS: dict[str, type[Path]] = {"linear": LinearFlow}
