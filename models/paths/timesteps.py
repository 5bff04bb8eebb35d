"""Distributions of timesteps in training, by their quantiles: pure functions of a quantile `u` in [0, 1] stored in the
batch, and of `position`, the number of images seen before its step. So a distribution may change in the course of a
run, independently of `train.images`.

To add one, write a function and add a line to TIMESTEPS.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Settings(Protocol):
    """The fields of a path's config that distributions use."""

    @property
    def logit_mean(self) -> float: ...

    @property
    def logit_std(self) -> float: ...


class Timesteps(NamedTuple):
    """A distribution: share(u, position, settings) returns times as shares of all the path's times, in [0, 1] and
    shaped like u (B,); 1 is the end at which the path's times are largest. `numbered`: only for paths whose times are
    numbered steps; otherwise only for the others."""

    share: Callable[[Tensor, int, Settings], Tensor]
    numbered: bool = False


def uniform(u: Tensor, position: int, settings: Settings) -> Tensor:
    """Return u: all times are equally likely."""
    return u


def logit_normal(u: Tensor, position: int, settings: Settings) -> Tensor:
    """Return numbers whose logit is normal with mean `logit_mean` and standard deviation `logit_std`."""
    edge = 2.0**-33  # below the spacing of the quantiles; keeps the logits of 0 and 1 finite
    normal = torch.special.ndtri(u.double().clamp(edge, 1 - edge))
    return torch.sigmoid(settings.logit_mean + settings.logit_std * normal).to(u.dtype)


TIMESTEPS = {
    "uniform": Timesteps(uniform),
    "logit_normal": Timesteps(logit_normal),
    "discrete": Timesteps(uniform, numbered=True),
}
