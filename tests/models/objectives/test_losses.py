"""The losses of the paths, against their formulas by hand: JiT's, and min-SNR's on every path."""

import numpy as np
import pytest
import torch

from models.paths.registry import PATHS, make_path, path_config
from tests.models.gaussian import factors, mixture, slopes

SEEDS = range(4)
GAMMAS = (0.2, 1.0, 5.0)


def setting(seed, name, number=12):
    """x, noise, t from 0 to almost the data, and some prediction."""
    generator = torch.Generator().manual_seed(seed)
    x, noise, prediction = torch.randn(3, number, 2, 3, 3, generator=generator, dtype=torch.float64)
    t = torch.rand(number, generator=generator, dtype=torch.float64)
    t[:4] = torch.tensor([0.0, 0.96, 0.99, 0.999])
    return x, noise, (t * 999).round() if name == "ddpm" else t, prediction


def predicted_data(name, prediction, x_t, t):
    """The clean image, solved by Cramer's rule from x_t and what is predicted."""
    if name == "jit":
        return prediction
    alpha, sigma = factors(mixture(name, t.numpy()))
    if name == "ddpm":
        return (x_t - sigma * prediction) / alpha
    d_alpha, d_sigma = factors(slopes(name, t.numpy()))
    return (d_sigma * x_t - sigma * prediction) / (d_sigma * alpha - sigma * d_alpha)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("gamma", GAMMAS)
def test_min_snr_is_the_datas_squared_error_times_the_snr_cut_off(name, gamma, seed):
    x, noise, t, prediction = setting(seed, name)
    fixed = {"learns_variance": False} if name == "ddpm" else {}
    config = path_config({"name": name, "min_snr": gamma, **fixed})
    alpha, sigma = factors(mixture(name, t.numpy()))
    x_t = alpha * x + sigma * noise
    error = predicted_data(name, prediction, x_t, t) - x
    snr = (alpha / sigma).square().flatten()
    expected = snr.clamp(max=gamma) * error.square().flatten(1).mean(dim=1)
    assert (snr < gamma).any() and (snr > gamma).any()
    torch.testing.assert_close(make_path(config).loss(prediction, x, noise, x_t, t), expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", ["linear", "gvp", "jit"])
def test_min_snr_is_finite_at_both_ends_of_time(name):
    """Where SNR is 0 or infinite: training draws t = 0, and fp32 rounds up to t = 1."""
    x, noise, _, prediction = (part[:2] for part in setting(0, name))
    t = torch.tensor([0.0, 1.0])
    path = make_path(path_config({"name": name, "min_snr": 5.0}))
    loss = path.loss(prediction, x, noise, path.noisy(x, noise, t), t)
    assert loss.isfinite().all()
    assert loss[0] == 0  # SNR 0


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", PATHS)
def test_the_datas_error_is_the_derivative_of_the_data_by_the_error_that_the_loss_squares(name, seed):
    """By two graphs: of the data and of the error, both by the prediction. For jit above and below its floor."""
    x, noise, t, prediction = setting(seed, name)
    path = PATHS[name]()
    prediction.requires_grad_()
    data = path.data(prediction, path.noisy(x, noise, t), t)
    by_prediction = torch.autograd.grad(data.sum(), prediction)[0]
    error = torch.autograd.grad(path.error(prediction, x, noise, t).sum(), prediction)[0]
    expected = (by_prediction / error).flatten(1)
    assert torch.allclose(expected, expected[:, :1].expand_as(expected), rtol=1e-9)
    torch.testing.assert_close(path.data_error(t), expected[:, 0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_jits_loss_is_the_squared_difference_of_velocities_with_a_floor_of_0_05(seed):
    """v = (x - z) / max(1 - t, 0.05), of the image and of the predicted one (arXiv 2511.13720; its public code)."""
    x, noise, t, prediction = setting(seed, "jit")
    z = t.view(-1, 1, 1, 1) * x + (1 - t.view(-1, 1, 1, 1)) * noise
    expected = []
    for i, time in enumerate(t.tolist()):
        below = max(1 - time, 0.05)
        v, v_predicted = (x[i].numpy() - z[i].numpy()) / below, (prediction[i].numpy() - z[i].numpy()) / below
        expected.append(np.mean((v_predicted - v) ** 2))
    np.testing.assert_allclose(PATHS["jit"]().loss(prediction, x, noise, z, t).numpy(), expected, rtol=1e-10)
    assert (1 - t < 0.05).any()


@pytest.mark.parametrize("name", ["linear", "gvp", "vp"])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_loss_of_a_flow_is_the_squared_error_of_the_velocity(name, seed):
    x, noise, t, prediction = setting(seed, name)
    d_alpha, d_sigma = factors(slopes(name, t.numpy()))
    path = PATHS[name]()
    expected = (prediction - d_alpha * x - d_sigma * noise).square().flatten(1).mean(dim=1)
    torch.testing.assert_close(path.loss(prediction, x, noise, path.noisy(x, noise, t), t), expected)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"name": "ddpm", "timesteps": "uniform"}, "timesteps=uniform: not with name=ddpm; set discrete"),
        (
            {"name": "jit", "timesteps": "discrete"},
            "timesteps=discrete: not with name=jit; set uniform or logit_normal",
        ),
        ({"name": "cosine"}, "name"),
        ({"min_snr": 0}, "min_snr"),
        ({"logit_std": 0}, "logit_std"),
    ],
)
def test_a_path_that_cannot_be_is_an_error_that_names_the_field(values, said):
    with pytest.raises(ValueError, match=said):
        path_config(values)
