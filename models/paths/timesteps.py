"""Distributions of timesteps in training, by their quantiles: functions of a quantile `u` in [0, 1] that is stored in
the batch, and of `position`, the images seen before its step. So a distribution is a pure function of both, and may
change in the course of a run without what `train.images` says.

To add one: a function, and a line in TIMESTEPS.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Settings(Protocol):
    """What distributions have of their own in a path's config."""

    @property
    def logit_mean(self) -> float: ...

    @property
    def logit_std(self) -> float: ...


class Timesteps(NamedTuple):
    """A distribution: share(u, position, settings) gives times as shares of all the path's times, in [0, 1] and shaped
    like u (B,); near 1 is near the end at which the path's times are greatest. `numbered`: for paths whose times are
    numbered steps, and for no others."""

    share: Callable[[Tensor, int, Settings], Tensor]
    numbered: bool = False


def uniform(u: Tensor, position: int, settings: Settings) -> Tensor:
    """Return u: each time as often."""
    return u


def logit_normal(u: Tensor, position: int, settings: Settings) -> Tensor:
    """Return numbers whose logit is normal, of mean `logit_mean` and standard deviation `logit_std`."""
    edge = 2.0**-33  # below the spacing of the numbers: what is 0 or 1 stays finite
    normal = torch.special.ndtri(u.double().clamp(edge, 1 - edge))
    return torch.sigmoid(settings.logit_mean + settings.logit_std * normal).to(u.dtype)


TIMESTEPS = {
    "uniform": Timesteps(uniform),
    "logit_normal": Timesteps(logit_normal),
    "discrete": Timesteps(uniform, numbered=True),
}
