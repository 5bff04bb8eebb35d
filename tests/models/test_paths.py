import math

import pytest
import torch

from models.paths import PATHS, LinearFlow

SEEDS = range(5)


def images(seed, number=6):
    generator = torch.Generator().manual_seed(seed)
    x, noise = torch.randn(2, number, 2, 3, 3, generator=generator, dtype=torch.float64)
    return x, noise, torch.rand(number, generator=generator, dtype=torch.float64)


@pytest.fixture(params=PATHS)
def path(request):
    return PATHS[request.param]()


@pytest.mark.parametrize("seed", SEEDS)
def test_linear_flow_mixes_each_image_by_its_own_time(seed):
    x, noise, t = images(seed)
    noisy = LinearFlow().noisy(x, noise, t)
    for i, weight in enumerate(t.tolist()):
        torch.testing.assert_close(noisy[i], weight * x[i] + (1 - weight) * noise[i])


@pytest.mark.parametrize("seed", SEEDS)
def test_linear_flow_runs_from_noise_at_0_to_data_at_1(seed):
    x, noise, t = images(seed)
    assert torch.equal(LinearFlow().noisy(x, noise, torch.zeros_like(t)), noise)
    assert torch.equal(LinearFlow().noisy(x, noise, torch.ones_like(t)), x)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_target_as_velocity_is_the_time_derivative_of_the_noisy_image(path, seed):
    x, noise, t = images(seed)
    t, h = 0.1 + 0.8 * t, 1e-4
    slope = (path.noisy(x, noise, t + h) - path.noisy(x, noise, t - h)) / (2 * h)
    velocity = path.velocity(path.target(x, noise, t), path.noisy(x, noise, t), t)
    torch.testing.assert_close(velocity, slope, rtol=0, atol=1e-6)


def test_linear_flow_predicts_data_less_noise():
    x, noise, t = images(0)
    assert torch.equal(LinearFlow().target(x, noise, t), x - noise)
    prediction = torch.randn_like(x)
    assert torch.equal(LinearFlow().velocity(prediction, x, t), prediction)


def test_log_snr_of_linear_flow_is_that_of_alpha_t_and_sigma_1_minus_t():
    t = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    alpha, sigma = t, 1 - t
    torch.testing.assert_close(LinearFlow().log_snr(t), torch.log(alpha**2 / sigma**2), rtol=1e-12, atol=1e-12)
    assert LinearFlow().log_snr(torch.tensor([0.0, 0.5, 1.0])).tolist() == [-math.inf, 0, math.inf]


def test_log_snr_is_measured_by_what_noisy_does(path):
    """alpha and sigma read off the path itself, by an image of ones without noise and the reverse."""
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    one, zero = torch.ones(99, 1, 1, 1, dtype=torch.float64), torch.zeros(99, 1, 1, 1, dtype=torch.float64)
    alpha, sigma = path.noisy(one, zero, t).flatten(), path.noisy(zero, one, t).flatten()
    torch.testing.assert_close(path.log_snr(t), 2 * torch.log(alpha / sigma))


def test_noise_grows_as_log_snr_falls(path):
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    order = path.log_snr(t).argsort()
    zero, one = torch.zeros(99, 1, 1, 1, dtype=torch.float64), torch.ones(99, 1, 1, 1, dtype=torch.float64)
    sigma = path.noisy(zero, one, t[order]).flatten()
    assert (sigma.diff() < 0).all()
    assert len(path.log_snr(t).unique()) == 99


def test_log_snr_of_fp32_time_keeps_its_precision():
    t = torch.tensor([0.001, 0.25, 0.9999], dtype=torch.float32)
    exact = [2 * math.log(value / (1 - value)) for value in t.tolist()]
    assert LinearFlow().log_snr(t).tolist() == pytest.approx(exact, rel=1e-12)
