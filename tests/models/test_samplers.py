"""Samplers against the exact solution for Gaussian data.

Data x ~ N(m, s^2), noise e ~ N(0, 1), x_t = t x + (1 - t) e. The best velocity is E[x - e | x_t]. All is Gaussian:
    Var x_t = t^2 s^2 + (1 - t)^2,    Cov(x - e, x_t) = t s^2 - (1 - t),
so v(x_t, t) = m + (t s^2 - (1 - t)) / Var x_t * (x_t - t m), and dx_t/dt = v has the solution
x_t = t m + sqrt(Var x_t) e: the transport map from noise is x = m + s e.
"""

import math
from itertools import pairwise

import pytest
import torch

from models.samplers import SAMPLERS, euler, heun

ORDERS = pytest.mark.parametrize(("sampler", "order"), [(euler, 1), (heun, 2)])
GAUSSIANS = pytest.mark.parametrize(("mean", "std"), [(0.0, 0.5), (1.5, 0.3), (-2.0, 2.0), (0.7, 0.9)])


def velocity_of_gaussian(mean, std):
    def velocity(x, t):
        variance = t**2 * std**2 + (1 - t) ** 2
        return mean + (t * std**2 - (1 - t)) / variance * (x - t * mean)

    return velocity


def noise(seed=0):
    return torch.randn(64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def error(sampler, mean, std, steps):
    x = sampler(velocity_of_gaussian(mean, std), noise(), steps)
    return (x - (mean + std * noise())).abs().max().item()


@ORDERS
@GAUSSIANS
def test_halving_the_step_divides_the_error_by_two_to_the_order(sampler, order, mean, std):
    errors = [error(sampler, mean, std, steps) for steps in (256, 512, 1024)]
    for coarse, fine in pairwise(errors):
        assert abs(math.log2(coarse / fine) - order) < 0.15


@ORDERS
@GAUSSIANS
def test_samples_converge_to_the_exact_transport_map(sampler, order, mean, std):
    assert error(sampler, mean, std, 2000) < {1: 5e-3, 2: 1e-5}[order]


def test_a_constant_velocity_is_integrated_exactly_in_one_step():
    slope = torch.randn(64, dtype=torch.float64)
    for sampler in SAMPLERS.values():
        torch.testing.assert_close(sampler(lambda x, t: slope, noise(), 1), noise() + slope)


def test_heun_is_exact_where_velocity_is_linear_in_time_and_euler_is_not():
    torch.testing.assert_close(heun(lambda x, t: 2 * t + 0 * x, noise(), 3), noise() + 1)
    torch.testing.assert_close(euler(lambda x, t: 2 * t + 0 * x, noise(), 4), noise() + 0.75)


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_time_runs_from_0_in_equal_steps_and_only_heun_reaches_1(steps):
    seen = {}
    for name, sampler in SAMPLERS.items():
        times = seen[name] = []
        sampler(lambda x, t, times=times: times.append(t) or x, noise(), steps)
    grid = [i / steps for i in range(steps + 1)]
    assert seen["euler"] == grid[:-1]
    assert seen["heun"] == [t for pair in pairwise(grid) for t in pair]


@pytest.mark.parametrize("sampler", SAMPLERS.values())
def test_sampling_leaves_the_noise_as_it_is(sampler):
    start = noise()
    sampler(velocity_of_gaussian(1, 0.5), start, 3)
    assert torch.equal(start, noise())
