"""Samplers of ODEs against the exact flow of Gaussian data; see gaussian.py."""

import math
from itertools import pairwise

import pytest
import torch

from models.paths.registry import PATHS
from models.sampling.registry import SAMPLERS
from models.sampling.samplers import Problem, SamplerConfig, State
from tests.models.gaussian import ENDS, FLOWS, GAUSSIANS, Gaussian, factors, mixture, normal

ORDERS = {"euler": 1, "heun": 2, "pseudo_corrector": 2, "ddim": 1}
ODES = (*ORDERS, "dopri5")


def run(name, path, denoise, x, steps, **settings):
    """What a sampler makes of x, and the times at which it called the network."""
    sampler, settings, seen = SAMPLERS[name], SamplerConfig(**settings), []
    times = sampler.times(PATHS[path](), steps, settings)
    problem = Problem(lambda x, t: seen.append(t) or denoise(x, t), PATHS[path](), times, None, settings)
    return sampler.run(problem, State(x)).x, seen


def error(name, path, gaussian, steps, **settings):
    x = normal(64)
    out, seen = run(name, path, gaussian.denoise(path), x, steps, **settings)
    return (out - gaussian.transport(path, x, *ENDS[path])).abs().max().item(), seen


@pytest.mark.parametrize(("name", "order"), ORDERS.items())
@pytest.mark.parametrize("path", FLOWS)
@pytest.mark.parametrize("gaussian", GAUSSIANS[1:3], ids=str)
def test_halving_the_step_divides_the_error_by_two_to_the_order(name, order, path, gaussian):
    """Also on vp, whose sigma' is infinite at the data: the exact flow of Gaussian data goes by sigma^2, which is
    smooth. And on jit, whose last step is Euler's: one step of order h^2."""
    errors = [error(name, path, gaussian, steps)[0] for steps in (64, 128, 256)]
    for coarse, fine in pairwise(errors):
        assert abs(math.log2(coarse / fine) - order) < 0.1


@pytest.mark.parametrize("path", FLOWS)
@pytest.mark.parametrize("gaussian", GAUSSIANS[::3], ids=str)
def test_samples_converge_to_the_exact_transport_map(path, gaussian):
    for name, order in ORDERS.items():
        assert error(name, path, gaussian, 200)[0] < {1: 3e-2, 2: 2e-4}[order]


@pytest.mark.parametrize("name", ODES)
@pytest.mark.parametrize("steps", [1, 5])
def test_a_constant_velocity_is_integrated_exactly_in_one_step(name, steps):
    slope = torch.randn(2, 1, 1, 32, dtype=torch.float64)
    torch.testing.assert_close(run(name, "linear", lambda x, t: slope, normal(64), steps)[0], normal(64) + slope)


def test_methods_of_order_2_are_exact_where_velocity_is_linear_in_time_and_euler_is_not():
    for name, expected in (("heun", 1), ("pseudo_corrector", 1), ("euler", 0.75)):
        out, _ = run(name, "linear", lambda x, t: 2 * t + 0 * x, normal(64), 4)
        torch.testing.assert_close(out, normal(64) + expected)


@pytest.mark.parametrize("name", ["ddim", "euler", "heun", "pseudo_corrector", "dopri5"])
def test_one_and_the_same_image_is_reached_from_everywhere_by_jit_in_any_number_of_steps(name):
    """A network that is sure of the image: x = 0.7 whatever the noise; what is left of it is exactly none."""
    for steps in (1, 2, 7, 50):
        out, seen = run(name, "jit", lambda x, t: torch.full_like(x, 0.7), normal(64), steps)
        torch.testing.assert_close(out, torch.full_like(out, 0.7), rtol=0, atol=1e-12)
        assert max(seen) < 1


@pytest.mark.parametrize("path", [*FLOWS, "ddpm"])
@pytest.mark.parametrize("steps", [2, 9, 40])
def test_ddim_is_exact_for_data_of_one_image(path, steps):
    """The noise is then known from any x_t: x_t = alpha m + sigma e, and so is every other mixture."""
    point, start, end = Gaussian(0.7, 0.0), *ENDS[path]
    (alpha, sigma), (end_alpha, end_sigma) = factors(mixture(path, start)), factors(mixture(path, end))
    out, _ = run("ddim", path, point.denoise(path), alpha * 0.7 + sigma * normal(64), steps)
    torch.testing.assert_close(out, end_alpha * 0.7 + end_sigma * normal(64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("path", ["linear", "jit"])
def test_on_a_linear_path_ddim_is_euler(path):
    for gaussian in GAUSSIANS:
        ddim, euler = (run(name, path, gaussian.denoise(path), normal(64), 7)[0] for name in ("ddim", "euler"))
        torch.testing.assert_close(ddim, euler, rtol=0, atol=1e-12)


@pytest.mark.parametrize("path", FLOWS)
@pytest.mark.parametrize("steps", [1, 3, 10])
def test_time_runs_in_equal_steps_and_only_methods_of_order_2_reach_the_end_if_they_can(path, steps):
    start, end = ENDS[path]
    seen = {name: run(name, path, GAUSSIANS[0].denoise(path), normal(4), steps)[1] for name in ORDERS}
    grid = [start + (end - start) * i / steps for i in range(steps + 1)]
    assert seen["euler"] == seen["ddim"] == pytest.approx(grid[:-1])
    pairs = [t for pair in pairwise(grid) for t in pair]
    assert seen["heun"] == pytest.approx(pairs[:-1] if path == "jit" else pairs)
    assert seen["pseudo_corrector"] == pytest.approx([*grid[:-1], grid[-2] if path == "jit" else end])


@pytest.mark.parametrize("steps", range(1, 120, 7))
def test_no_sampler_of_jit_ever_divides_by_0_at_the_data(steps):
    for name in ("heun", "pseudo_corrector", "euler", "ddim"):
        assert run(name, "jit", lambda x, t: x.sin(), normal(4), steps)[0].isfinite().all()


@pytest.mark.parametrize("path", FLOWS)
@pytest.mark.parametrize("gaussian", GAUSSIANS, ids=str)
def test_dopri5_meets_its_tolerance(path, gaussian):
    """Which holds for a step; errors of a few tens of steps add up. jit's last leap, 1e-3 long, is Euler's."""
    worst, calls = {}, {}
    for tolerance in (1e-4, 1e-6, 1e-8):
        worst[tolerance], seen = error("dopri5", path, gaussian, 1, tolerance=tolerance)
        calls[tolerance] = len(seen)
        leap = 1e-5 if path == "jit" else 0
        assert worst[tolerance] < 50 * tolerance * (1 + 4 * gaussian.std + abs(gaussian.mean)) + leap
    assert worst[1e-4] > worst[1e-6]
    assert worst[1e-8] < worst[1e-6] + leap
    assert calls[1e-4] < calls[1e-6] < calls[1e-8] < 300


@pytest.mark.parametrize("path", FLOWS)
@pytest.mark.parametrize("size", [0.0, 1e-7, 1e-4, 1e-2, 1.0, 3.0])
def test_dopri5_stays_within_the_times_of_the_path_however_slow_or_fast_it_is(path, size):
    """An almost still velocity tempts it to long steps: the first is guessed, the last would go beyond the end."""
    for gaussian in (None, *GAUSSIANS):

        def denoise(x, t, gaussian=gaussian):
            return size * (gaussian.prediction(path, x, t) if gaussian else torch.full_like(x, 0.3))

        _, seen = run("dopri5", path, denoise, normal(64), 1)
        start, end = ENDS[path]
        assert min(seen) == start
        assert max(seen) <= end - (1e-3 if path == "jit" else 0)


@pytest.mark.parametrize("name", ODES)
@pytest.mark.parametrize("path", FLOWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sampling_leaves_the_noise_as_it_is_and_keeps_its_type_and_shape(name, path, dtype):
    start = normal(64, dtype=dtype)
    out, _ = run(name, path, GAUSSIANS[1].denoise(path), start, 3)
    assert torch.equal(start, normal(64, dtype=dtype))
    assert out.dtype == dtype and out.shape == start.shape
