"""Deterministic samplers: those of the ODE dx = velocity dt, and DDIM."""

from typing import Any

import torch
from torch import Tensor

from models.sampling.samplers import NotFinite, Problem, State, all_finite, same_time

SINGULAR_END = 1e-3  # how far before a singular end an adaptive sampler stops


def euler(problem: Problem, state: State) -> State:
    """Take a step of Euler's method, order 1: one evaluation per step."""
    x, i, _ = state
    t, after = problem.times[i : i + 2]
    return State(x + (after - t) * problem.velocity(x, t), i + 1)


def heun(problem: Problem, state: State) -> State:
    """Take a step of Heun's method, order 2 (Karras et al., arXiv 2206.00364, alg. 1 without noise): two evaluations
    per step, but one in the last if the path is singular there."""
    x, i, _ = state
    t, after = problem.times[i : i + 2]
    slope = problem.velocity(x, t)
    ahead = x + (after - t) * slope
    if not ends_singular(problem, after):
        ahead = x + (after - t) * (slope + problem.velocity(ahead, after)) / 2
    return State(ahead, i + 1)


def pseudo_corrector(problem: Problem, state: State) -> State:
    """Take a step of FlowTurbo's method (Zhao et al., arXiv 2409.18128, eq. 8): Heun's, but the slope at the predictor
    is reused at the beginning of the next step. Order 2, one evaluation per step and one at the start."""
    x, i, kept = state
    t, after = problem.times[i : i + 2]
    slope = kept[0] if kept else problem.velocity(x, t)
    if ends_singular(problem, after):
        return State(x + (after - t) * problem.velocity(x, t), i + 1)
    ahead = problem.velocity(x + (after - t) * slope, after)
    return State(x + (after - t) * (slope + ahead) / 2, i + 1, (ahead,))


def dopri5(problem: Problem, state: State) -> State:
    """Integrate from the state's time to the end by Dormand and Prince's method of order 5, by torchdiffeq, with steps
    that meet the tolerance. Before a singular end, stop and go to the predicted data. Raise NotFinite where a velocity
    is not finite: no step would meet the tolerance."""
    from torchdiffeq import odeint  # slow to import (half a second, with scipy), and training does not need it

    path, times = problem.path, problem.times
    end = times[-1] - SINGULAR_END * path.singular
    span = torch.tensor([times[state.step], end], dtype=torch.float64, device=state.x.device)
    last = {"step_t": span[1:]}  # a step ends there: none goes beyond it, where there is no path
    tolerance = problem.settings.tolerance

    def velocity(t: Tensor, x: Tensor) -> Tensor:
        slope = problem.velocity(x, min(float(t), end))  # its guess of a first step may go beyond the end
        finite = all_finite(slope)
        if not finite.all():
            raise NotFinite(finite)
        return slope

    x: Any = odeint(
        velocity,
        state.x,
        span,
        rtol=tolerance,
        atol=tolerance,
        method="dopri5",
        options=last,
    )[1]
    x = path.data(problem.denoise(x, end), x, same_time(end, x)) if path.singular else x
    return State(x, len(times) - 1)


def ddim(problem: Problem, state: State) -> State:
    """Take a step of DDIM without noise (Song et al., arXiv 2010.02502, eq. 12), on any path: mix the predicted data
    and noise as at the next time. One evaluation per step."""
    (x, i, _), path = state, problem.path
    t, after = problem.times[i : i + 2]
    prediction = problem.denoise(x, t)
    now, (alpha, sigma, *_) = same_time(t, x), path.at(same_time(after, x), x)
    return State(alpha * path.data(prediction, x, now) + sigma * path.noise(prediction, x, now), i + 1)


def ends_singular(problem: Problem, after: float) -> bool:
    """Return whether a step ends at the data, on a path whose velocity is infinite there."""
    return problem.path.singular and after == problem.path.cleanest
