"""What a sampler is: it follows a path from noise to images step by step, using a function `denoise(x, t)` that returns
the network's prediction. It knows nothing of groups, classes or guidance."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from models.paths.base import NoisePath

Denoise = Callable[[Tensor, float], Tensor]
Draw = Callable[[int], Tensor]


class SamplerConfig(
    BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True, json_schema_extra={"sampling": "only"}
):
    """Config fields of particular samplers."""

    tolerance: float = Field(1e-4, gt=0)
    """Of dopri5: relative and absolute error allowed in a step."""
    diffusion: Literal["sigma", "linear", "constant", "decreasing", "rising-falling", "sbdm"] = "sigma"
    """Of sde: how the strength of the added noise depends on time, under SiT's names."""
    diffusion_norm: float = Field(1.0, gt=0)
    """Of sde: factor on the strength of the added noise."""


class Problem(NamedTuple):
    """What to sample: `times` runs from the noise to the data, `draw(i)` returns standard normal noise for step i,
    shaped like the images, and `settings` holds the sampler's own config fields."""

    denoise: Denoise
    path: NoisePath
    times: list[float]
    draw: Draw
    settings: SamplerConfig

    def velocity(self, x: Tensor, t: float) -> Tensor:
        """Return dx/dt of images x (B, C, H, W) at time t."""
        return self.path.velocity(self.denoise(x, t), x, same_time(t, x))


class NotFinite(ArithmeticError):
    """A sampler whose steps are of a whole batch cannot go on; `finite` (B,) bool: whose prediction is finite."""

    def __init__(self, finite: Tensor) -> None:
        super().__init__("a prediction is not finite")
        self.finite = finite


class State(NamedTuple):
    """The state of a sampler: images x (B, C, H, W) at the beginning of step number `step`, and what the sampler keeps
    from earlier steps. Steps change no tensor in place, so a saved state stays valid."""

    x: Tensor
    step: int = 0
    memory: tuple[Tensor, ...] = ()


class Sampler(NamedTuple):
    """A sampler: `step` returns the state after one step, or after several; `needs` names what it converts predictions
    to (see NoisePath.offers); `times` returns the times, given (path, number of steps, settings); `adaptive`: its steps
    are as all images of a batch need them."""

    step: Callable[[Problem, State], State]
    needs: frozenset[str]
    times: Callable[[NoisePath, int, SamplerConfig], list[float]]
    adaptive: bool = False

    def run(self, problem: Problem, state: State, until: int | None = None) -> State:
        """Continue from a state until step number `until` begins; None: to the end."""
        until = len(problem.times) - 1 if until is None else until
        while state.step < until:
            state = self.step(problem, state)
        return state


def even_times(path: NoisePath, steps: int, settings: SamplerConfig) -> list[float]:
    """Return the path's evenly spaced times."""
    return path.even_times(steps)


def all_finite(x: Tensor) -> Tensor:
    """Return of each image (B, ...) whether it is finite, (B,) bool, without waiting for the device."""
    return x.flatten(1).isfinite().all(dim=1)


def same_time(t: float, x: Tensor) -> Tensor:
    """Return one time for all images."""
    return torch.full((len(x),), t, dtype=torch.float64, device=x.device)
