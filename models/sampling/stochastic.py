"""Stochastic samplers: ancestral sampling, and SiT's SDE."""

import math
from typing import Any

import torch

from models.paths.base import NoisePath
from models.sampling.samplers import Problem, SamplerConfig, State, same_time

SDE_END, SBDM_START = 0.04, 1e-3  # SiT's: the size of the last step; the first time, where sbdm's diffusion is finite


def ddpm(problem: Problem, state: State) -> State:
    """Take a step of ancestral sampling (Ho et al., arXiv 2006.11239, alg. 2) with the model's variance. One evaluation
    per step."""
    x, i, _ = state
    path: Any = problem.path  # a path that offers the posterior has `reverse`
    t, before = problem.times[i : i + 2]
    mean, log_variance = path.reverse(problem.denoise(x, t), x, same_time(t, x), same_time(before, x))
    last = before == path.cleanest
    return State(mean if last else mean + (0.5 * log_variance).exp() * problem.draw(i), i + 1)


def sde(problem: Problem, state: State) -> State:
    """Take an Euler-Maruyama step on SiT's SDE, dx = (velocity + w score) dt + sqrt(2 w) dW (arXiv 2401.08740, eq. 10,
    11); the last step has no noise ("mean" in SiT's code). One evaluation per step."""
    (x, i, _), path = state, problem.path
    t, after = problem.times[i : i + 2]
    prediction, now, step = problem.denoise(x, t), same_time(t, x), after - t
    w = _diffusion(path, t, problem.settings)
    x = x + step * (path.velocity(prediction, x, now) + w * path.score(prediction, x, now))
    if after < problem.times[-1]:
        x = x + math.sqrt(2 * w * step) * problem.draw(i)
    return State(x, i + 1)


def _diffusion(path: NoisePath, t: float, settings: SamplerConfig) -> float:
    """Return w at a time (table 2 of arXiv 2401.08740; the last two as in its code)."""
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


def sde_times(path: NoisePath, steps: int, settings: SamplerConfig) -> list[float]:
    """Return SiT's times: evenly spaced up to the last step, which is SDE_END wide."""
    start = SBDM_START if settings.diffusion == "sbdm" else path.noisiest
    even = torch.linspace(start, 1 - SDE_END, steps, dtype=torch.float64).tolist()
    return [*even, 1.0]
