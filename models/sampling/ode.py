"""Samplers of the ODE dx = velocity dt, and DDIM: nothing in them is random."""

from typing import Any

import torch

from models.sampling.samplers import Problem, State, same_time

SINGULAR_END = 1e-3  # before a singular end, where an adaptive sampler stops


def euler(problem: Problem, state: State) -> State:
    """Euler's method, order 1: one evaluation a step."""
    x, i, _ = state
    t, after = problem.times[i : i + 2]
    return State(x + (after - t) * problem.velocity(x, t), i + 1)


def heun(problem: Problem, state: State) -> State:
    """Heun's method, order 2 (Karras et al., arXiv 2206.00364, alg. 1 without noise): two evaluations a step; one in
    the last, where the path is singular there."""
    x, i, _ = state
    t, after = problem.times[i : i + 2]
    slope = problem.velocity(x, t)
    ahead = x + (after - t) * slope
    if not ends_singular(problem, after):
        ahead = x + (after - t) * (slope + problem.velocity(ahead, after)) / 2
    return State(ahead, i + 1)


def pseudo_corrector(problem: Problem, state: State) -> State:
    """FlowTurbo's (Zhao et al., arXiv 2409.18128, eq. 8): Heun's, but the slope at a step's end, where the predictor
    arrived, serves for the next step's begin: order 2, one evaluation a step and one at the start."""
    x, i, kept = state
    t, after = problem.times[i : i + 2]
    slope = kept[0] if kept else problem.velocity(x, t)
    if ends_singular(problem, after):
        return State(x + (after - t) * problem.velocity(x, t), i + 1)
    ahead = problem.velocity(x + (after - t) * slope, after)
    return State(x + (after - t) * (slope + ahead) / 2, i + 1, (ahead,))


def dopri5(problem: Problem, state: State) -> State:
    """Dormand and Prince's method of order 5 with steps as the tolerance asks, by torchdiffeq: from the state's time to
    the end at once. Before a singular end it stops, and goes to the predicted data."""
    from torchdiffeq import odeint  # with scipy it takes half a second to import, and no training needs it

    path, times = problem.path, problem.times
    end = times[-1] - SINGULAR_END * path.singular
    span = torch.tensor([times[state.step], end], dtype=torch.float64, device=state.x.device)
    last = {"step_t": span[1:]}  # a step ends there: none goes on beyond it, where there is no path
    tolerance = problem.settings.tolerance
    x: Any = odeint(
        lambda t, x: problem.velocity(x, min(float(t), end)),  # its guess of a first step may look beyond
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
    """DDIM without noise (Song et al., arXiv 2010.02502, eq. 12): the predicted data and noise, mixed as at the next
    time; on any path. One evaluation a step."""
    (x, i, _), path = state, problem.path
    t, after = problem.times[i : i + 2]
    prediction = problem.denoise(x, t)
    now, (alpha, sigma, *_) = same_time(t, x), path.at(same_time(after, x), x)
    return State(alpha * path.data(prediction, x, now) + sigma * path.noise(prediction, x, now), i + 1)


def ends_singular(problem: Problem, after: float) -> bool:
    """Whether a step ends at the data of a path whose velocity is infinite there."""
    return problem.path.singular and after == problem.path.cleanest
