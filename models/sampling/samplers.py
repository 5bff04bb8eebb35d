"""Samplers: from noise along a path to images, by a function `denoise(x, t)` that gives the network's prediction.

They know nothing of groups, classes or guidance. Each is a function of (denoise, path, x, times, draw, settings): x
(B, C, H, W) starts as the noise, `times` runs from the noise to the data, `draw(i)` is standard normal noise shaped
like x for step i, and `settings` are the sampler's own fields of the config.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from models.paths.base import NoisePath
from models.paths.ddpm import respaced

Denoise = Callable[[Tensor, float], Tensor]
Draw = Callable[[int], Tensor]
SDE_END, SBDM_START = 0.04, 1e-3  # SiT's: the last step's size; where its diffusion is finite
SINGULAR_END = 1e-3  # before a singular end, where an adaptive sampler stops


class SamplerConfig(
    BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True, json_schema_extra={"sampling": "only"}
):
    """What some samplers have of their own."""

    tolerance: float = Field(1e-4, gt=0)
    """Of dopri5: relative and absolute error that a step may have."""
    diffusion: Literal["sigma", "linear", "constant", "decreasing", "rising-falling", "sbdm"] = "sigma"
    """Of sde: how the strength of the added noise depends on time, under SiT's names."""
    diffusion_norm: float = Field(1.0, gt=0)
    """Of sde: factor on the strength of the added noise."""


def euler(
    denoise: Denoise, path: NoisePath, x: Tensor, times: list[float], draw: Draw, settings: SamplerConfig
) -> Tensor:
    """Euler's method, order 1: one evaluation a step."""
    for t, after in pairwise(times):
        x = x + (after - t) * _velocity(denoise, path, x, t)
    return x


def heun(
    denoise: Denoise, path: NoisePath, x: Tensor, times: list[float], draw: Draw, settings: SamplerConfig
) -> Tensor:
    """Heun's method, order 2 (Karras et al., arXiv 2206.00364, alg. 1 without noise): two evaluations a step; one in
    the last, where the path is singular there."""
    for t, after in pairwise(times):
        slope = _velocity(denoise, path, x, t)
        ahead = x + (after - t) * slope
        if not (path.singular and after == path.cleanest):
            ahead = x + (after - t) * (slope + _velocity(denoise, path, ahead, after)) / 2
        x = ahead
    return x


def pseudo_corrector(
    denoise: Denoise, path: NoisePath, x: Tensor, times: list[float], draw: Draw, settings: SamplerConfig
) -> Tensor:
    """FlowTurbo's (Zhao et al., arXiv 2409.18128, eq. 8): Heun's, but the slope at a step's end, where the predictor
    arrived, serves for the next step's begin: order 2, one evaluation a step and one at the start."""
    slope = _velocity(denoise, path, x, times[0])
    for t, after in pairwise(times):
        if path.singular and after == path.cleanest:
            return x + (after - t) * _velocity(denoise, path, x, t)
        ahead = _velocity(denoise, path, x + (after - t) * slope, after)
        x, slope = x + (after - t) * (slope + ahead) / 2, ahead
    return x


def dopri5(
    denoise: Denoise, path: NoisePath, x: Tensor, times: list[float], draw: Draw, settings: SamplerConfig
) -> Tensor:
    """Dormand and Prince's method of order 5 with steps as the tolerance asks, by torchdiffeq; of `times` only the ends
    count. Before a singular end it stops, and goes to the predicted data."""
    from torchdiffeq import odeint  # with scipy it takes half a second to import, and no training needs it

    end = times[-1] - SINGULAR_END * path.singular
    span = torch.tensor([times[0], end], dtype=torch.float64, device=x.device)
    last = {"step_t": span[1:]}  # a step ends there: none goes on beyond it, where there is no path
    x = odeint(
        lambda t, x: _velocity(denoise, path, x, min(float(t), end)),  # its guess of a first step may look beyond
        x,
        span,
        rtol=settings.tolerance,
        atol=settings.tolerance,
        method="dopri5",
        options=last,
    )[1]
    return path.data(denoise(x, end), x, _same(end, x)) if path.singular else x


def ddim(
    denoise: Denoise, path: NoisePath, x: Tensor, times: list[float], draw: Draw, settings: SamplerConfig
) -> Tensor:
    """DDIM without noise (Song et al., arXiv 2010.02502, eq. 12): the predicted data and noise, mixed as at the next
    time; on any path. One evaluation a step."""
    for t, after in pairwise(times):
        prediction = denoise(x, t)
        now, (alpha, sigma, *_) = _same(t, x), path.at(_same(after, x), x)
        x = alpha * path.data(prediction, x, now) + sigma * path.noise(prediction, x, now)
    return x


def ddpm(
    denoise: Denoise, path: NoisePath, x: Tensor, times: list[float], draw: Draw, settings: SamplerConfig
) -> Tensor:
    """Ancestral sampling (Ho et al., arXiv 2006.11239, alg. 2), with the variance as learned; the path ddpm alone."""
    for i, (t, before) in enumerate(pairwise(times)):
        mean, log_variance = path.reverse(denoise(x, t), x, _same(t, x), _same(before, x))
        x = mean if before < 0 else mean + (0.5 * log_variance).exp() * draw(i)
    return x


def sde(
    denoise: Denoise, path: NoisePath, x: Tensor, times: list[float], draw: Draw, settings: SamplerConfig
) -> Tensor:
    """Euler-Maruyama on SiT's SDE, dx = (velocity + w score) dt + sqrt(2 w) dW (arXiv 2401.08740, eq. 10, 11); the last
    step has no noise ("mean" in SiT's code). One evaluation a step."""
    for i, (t, after) in enumerate(pairwise(times)):
        prediction, now, step = denoise(x, t), _same(t, x), after - t
        w = _diffusion(path, t, settings)
        x = x + step * (path.velocity(prediction, x, now) + w * path.score(prediction, x, now))
        if after < times[-1]:
            x = x + math.sqrt(2 * w * step) * draw(i)
    return x


def _diffusion(path: NoisePath, t: float, settings: SamplerConfig) -> float:
    """w at a time (table 2 of arXiv 2401.08740; the last two as in its code)."""
    alpha, sigma, d_alpha, d_sigma = (float(part) for part in path.schedule(torch.tensor(t, dtype=torch.float64)))
    norm = settings.diffusion_norm
    match settings.diffusion:
        case "constant":
            return norm
        case "sigma":
            return norm * sigma
        case "linear":
            return norm * (1 - t)
        case "sbdm":
            return norm * (d_alpha / alpha * sigma**2 - sigma * d_sigma)
        case "decreasing":
            return 0.25 * (norm * math.cos(math.pi * t) + 1) ** 2
        case "rising-falling":
            return norm * math.sin(math.pi * t) ** 2


def _velocity(denoise: Denoise, path: NoisePath, x: Tensor, t: float) -> Tensor:
    return path.velocity(denoise(x, t), x, _same(t, x))


def _same(t: float, x: Tensor) -> Tensor:
    """One time for all images."""
    return torch.full((len(x),), t, dtype=torch.float64, device=x.device)


def even_times(path: NoisePath, steps: int, settings: SamplerConfig) -> list[float]:
    """Evenly spaced, or the steps of ddpm that are."""
    if path.name == "ddpm":
        return respaced(steps).tolist()
    return torch.linspace(path.noisiest, path.cleanest, steps + 1, dtype=torch.float64).tolist()


def sde_times(path: NoisePath, steps: int, settings: SamplerConfig) -> list[float]:
    """As SiT has them: evenly spaced up to the last step, which is SDE_END wide."""
    start = SBDM_START if settings.diffusion == "sbdm" else path.noisiest
    even = torch.linspace(start, 1 - SDE_END, steps, dtype=torch.float64).tolist()
    return [*even, 1.0]


class Sampler(NamedTuple):
    """A sampler, its times by (path, number of steps, settings), and the names of its paths."""

    run: Callable[[Denoise, NoisePath, Tensor, list[float], Draw, SamplerConfig], Tensor]
    times: Callable[[NoisePath, int, SamplerConfig], list[float]]
    paths: tuple[str, ...]


FLOWS = ("linear", "gvp", "vp", "jit")
SAMPLERS = {
    "euler": Sampler(euler, even_times, FLOWS),
    "heun": Sampler(heun, even_times, FLOWS),
    "pseudo_corrector": Sampler(pseudo_corrector, even_times, FLOWS),
    "dopri5": Sampler(dopri5, even_times, FLOWS),
    "sde": Sampler(sde, sde_times, FLOWS),
    "ddim": Sampler(ddim, even_times, (*FLOWS, "ddpm")),
    "ddpm": Sampler(ddpm, even_times, ("ddpm",)),
}
