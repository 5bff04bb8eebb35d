import math

import numpy as np
import pytest
import torch

from models.paths.registry import PATHS, LinearFlow, make_path, path_config
from tests.models.gaussian import ENDS, FLOWS, GAUSSIANS, factors, mixture, slopes

SEEDS = range(5)
EVERY = pytest.mark.parametrize("name", PATHS)


def images(seed, number=6):
    generator = torch.Generator().manual_seed(seed)
    x, noise = torch.randn(2, number, 2, 3, 3, generator=generator, dtype=torch.float64)
    return x, noise, torch.rand(number, generator=generator, dtype=torch.float64)


def grid(name):
    """Times of a path from its noisy to its clean end, without the data itself."""
    if name == "ddpm":
        return torch.arange(999, -1, -1, dtype=torch.float64)
    ends = [0, 1e-7, 1e-4, 1 - 1e-3, 1 - 1e-4]
    return torch.tensor(sorted({*ends, *np.linspace(0.01, 0.99, 99).tolist()}), dtype=torch.float64)


def some(name, t):
    """Times of a path from numbers in [0, 1]."""
    return (t * 999).round() if name == "ddpm" else 0.999 * t


@pytest.mark.parametrize("seed", SEEDS)
def test_linear_flow_mixes_each_image_by_its_own_time(seed):
    x, noise, t = images(seed)
    noisy = LinearFlow().noisy(x, noise, t)
    for i, weight in enumerate(t.tolist()):
        torch.testing.assert_close(noisy[i], weight * x[i] + (1 - weight) * noise[i])


@pytest.mark.parametrize("seed", SEEDS)
@EVERY
def test_a_noisy_image_is_the_mixture_of_its_own_time(name, seed):
    x, noise, t = images(seed)
    t = some(name, t)
    alpha, sigma = factors(mixture(name, t.numpy()))
    torch.testing.assert_close(make_path(path_config({"name": name})).noisy(x, noise, t), alpha * x + sigma * noise)


@pytest.mark.parametrize("name", ["linear", "gvp", "jit"])
@pytest.mark.parametrize("seed", SEEDS)
def test_flows_run_from_noise_at_0_to_data_at_1(name, seed):
    x, noise, t = images(seed)
    path = PATHS[name]()
    assert torch.equal(path.noisy(x, noise, torch.zeros_like(t)), noise)
    assert torch.equal(path.noisy(x, noise, torch.ones_like(t)), x)


def test_step_minus_1_of_ddpm_is_the_data_and_step_999_almost_noise():
    x, noise, t = images(0)
    path = PATHS["ddpm"]()
    assert torch.equal(path.noisy(x, noise, torch.full_like(t, -1)), x)
    torch.testing.assert_close(path.noisy(x, noise, torch.full_like(t, 999)), noise, rtol=0, atol=0.03)


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("seed", SEEDS)
def test_the_target_as_velocity_is_the_time_derivative_of_the_noisy_image(name, seed):
    x, noise, t = images(seed)
    path, t, h = PATHS[name](), 0.1 + 0.8 * t, 1e-4
    slope = (path.noisy(x, noise, t + h) - path.noisy(x, noise, t - h)) / (2 * h)
    velocity = path.velocity(path.target(x, noise, t), path.noisy(x, noise, t), t)
    torch.testing.assert_close(velocity, slope, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FLOWS)
def test_the_derivatives_of_a_schedule_are_those_of_its_own_alpha_and_sigma(name):
    t = grid(name).requires_grad_()
    alpha, sigma, d_alpha, d_sigma = PATHS[name]().schedule(t)
    for part, slope, true in ((alpha, d_alpha, 0), (sigma, d_sigma, 1)):
        by_graph = torch.autograd.grad(part.sum(), t, retain_graph=True)[0]
        torch.testing.assert_close(slope.detach(), by_graph, rtol=1e-8, atol=1e-12)
        exact = torch.from_numpy(slopes(name, t.detach().numpy())[true])
        torch.testing.assert_close(slope.detach(), exact, rtol=1e-8, atol=1e-12)


def test_linear_flow_predicts_data_less_noise():
    x, noise, t = images(0)
    assert torch.equal(LinearFlow().target(x, noise, t), x - noise)
    prediction = torch.randn_like(x)
    assert torch.equal(LinearFlow().velocity(prediction, x, t), prediction)


@pytest.mark.parametrize("gaussian", GAUSSIANS, ids=str)
@EVERY
def test_the_best_prediction_for_gaussian_data_stands_for_the_best_data_noise_velocity_and_score(name, gaussian):
    path, t = PATHS[name](), grid(name)
    mean, std = factors(gaussian.marginal(name, t.numpy()))
    x_t = mean + std * torch.randn(len(t), 1, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    prediction = gaussian.prediction(name, x_t, t)
    for kind, best in gaussian.best(name, x_t, t).items():
        atol = 1e-6 if kind == "score" else 1e-9  # jit's is divided by (1 - t)^2, which goes down to 1e-8
        torch.testing.assert_close(getattr(path, kind)(prediction, x_t, t), best, rtol=1e-9, atol=atol, msg=kind)


@pytest.mark.parametrize("seed", SEEDS)
@EVERY
def test_the_target_stands_for_the_very_image_and_noise(name, seed):
    x, noise, t = images(seed)
    path, t = PATHS[name](), some(name, t)
    x_t, target = path.noisy(x, noise, t), path.target(x, noise, t)
    torch.testing.assert_close(path.data(target, x_t, t), x, rtol=0, atol=1e-9)
    torch.testing.assert_close(path.noise(target, x_t, t), noise, rtol=0, atol=1e-9)
    assert not path.error(target, x, noise, t).any()


@EVERY
def test_conversions_of_fp32_images_stay_fp32_and_near(name):
    x, noise, t = images(0)
    path, t = PATHS[name](), some(name, 0.05 + 0.9 * t)
    x_t, prediction = path.noisy(x, noise, t), torch.randn_like(x)
    for kind in ("data", "noise", "velocity", "score"):
        exact = getattr(path, kind)(prediction, x_t, t)
        fp32 = getattr(path, kind)(prediction.float(), x_t.float(), t)
        assert fp32.dtype == torch.float32
        torch.testing.assert_close(fp32.double(), exact, rtol=1e-5, atol=1e-5 * exact.abs().max().item())


@pytest.mark.parametrize("seed", SEEDS)
def test_ddpms_velocity_is_the_derivative_by_the_angle_and_its_variance_channels_convert_to_nothing(seed):
    x, noise, t = images(seed)
    path, t = PATHS["ddpm"](), some("ddpm", t)
    angle = torch.atan2(*reversed(factors(mixture("ddpm", t.numpy()))))  # alpha = cos, sigma = sin
    prediction, x_t = torch.cat([noise, torch.randn_like(noise)], dim=1), path.noisy(x, noise, t)
    velocity = path.velocity(prediction, x_t, t)
    torch.testing.assert_close(velocity, angle.cos() * noise - angle.sin() * x, rtol=0, atol=1e-9)
    for kind in ("data", "noise", "velocity", "score"):
        assert torch.equal(getattr(path, kind)(prediction, x_t, t), getattr(path, kind)(noise, x_t, t))


def test_log_snr_of_linear_flow_is_that_of_alpha_t_and_sigma_1_minus_t():
    t = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    alpha, sigma = t, 1 - t
    torch.testing.assert_close(LinearFlow().log_snr(t), torch.log(alpha**2 / sigma**2), rtol=1e-12, atol=1e-12)
    assert LinearFlow().log_snr(torch.tensor([0.0, 0.5, 1.0])).tolist() == [-math.inf, 0, math.inf]


@EVERY
def test_log_snr_is_measured_by_what_noisy_does(name):
    """alpha and sigma read off the path itself, by an image of ones without noise and the reverse."""
    path, t = PATHS[name](), grid(name)
    one, zero = torch.ones(len(t), 1, 1, 1, dtype=torch.float64), torch.zeros(len(t), 1, 1, 1, dtype=torch.float64)
    alpha, sigma = path.noisy(one, zero, t).flatten(), path.noisy(zero, one, t).flatten()
    torch.testing.assert_close(path.log_snr(t), 2 * torch.log(alpha / sigma))


@EVERY
def test_noise_grows_as_log_snr_falls(name):
    path, t = PATHS[name](), grid(name)
    order = path.log_snr(t).argsort()
    zero, one = torch.zeros(len(t), 1, 1, 1, dtype=torch.float64), torch.ones(len(t), 1, 1, 1, dtype=torch.float64)
    sigma = path.noisy(zero, one, t[order]).flatten()
    alpha = path.noisy(one, zero, t[order]).flatten()
    assert (sigma[1:] <= sigma[:-1]).all() and (alpha[1:] >= alpha[:-1]).all()
    assert ((sigma / alpha).diff()[1:] < 0).all()
    assert len(path.log_snr(t).unique()) == len(t)


@EVERY
def test_the_noisiest_time_of_a_path_has_the_lowest_log_snr_and_the_cleanest_the_highest(name):
    path = PATHS[name]()
    assert (path.noisiest, path.cleanest) == ENDS[name]
    between = path.log_snr(grid(name)[1:-2] if name != "ddpm" else grid(name)[1:])
    low, high = path.log_snr(torch.tensor([path.noisiest, path.cleanest], dtype=torch.float64)).tolist()
    assert low < between.min() and between.max() < high


def test_log_snr_of_fp32_time_keeps_its_precision():
    t = torch.tensor([0.001, 0.25, 0.9999], dtype=torch.float32)
    exact = [2 * math.log(value / (1 - value)) for value in t.tolist()]
    assert LinearFlow().log_snr(t).tolist() == pytest.approx(exact, rel=1e-12)
    for name in ("gvp", "vp"):
        alpha, sigma = mixture(name, t.double().numpy())
        np.testing.assert_allclose(PATHS[name]().log_snr(t).numpy(), 2 * np.log(alpha / sigma), rtol=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_a_noise_scale_of_jit_is_that_of_the_noise_and_changes_nothing_else(seed, scale):
    x, noise, t = images(seed)
    scaled, plain = PATHS["jit"](path_config({"name": "jit", "noise_scale": scale})), PATHS["jit"]()
    t, prediction = 0.99 * t, torch.randn_like(x)
    x_t = plain.noisy(x, scale * noise, t)
    torch.testing.assert_close(scaled.noisy(x, noise, t), x_t)
    torch.testing.assert_close(scaled.log_snr(t), plain.log_snr(t) - 2 * math.log(scale))
    torch.testing.assert_close(scaled.noise(prediction, x_t, t), plain.noise(prediction, x_t, t) / scale)
    torch.testing.assert_close(scaled.score(prediction, x_t, t), plain.score(prediction, x_t, t) / scale**2)
    for kind in ("data", "velocity"):
        torch.testing.assert_close(getattr(scaled, kind)(prediction, x_t, t), getattr(plain, kind)(prediction, x_t, t))
    losses = (path.loss(prediction, x, e, x_t, t) for path, e in ((scaled, noise), (plain, scale * noise)))
    torch.testing.assert_close(*losses)
