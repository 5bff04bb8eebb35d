"""Timesteps as training has them: quantiles of the path's distribution, for shares that are uniform in [0, 1]."""

import numpy as np
import pytest
import torch
from scipy.special import expit
from scipy.stats import chisquare, kstest, norm

from data.batches.batch import spread_quantiles
from models.paths.registry import PATHS, make_path, path_config

LATEST = {"linear": 1, "gvp": 1, "vp": 1 - 1e-5, "jit": 1}


def timesteps(name, kind, shares, **values):
    config = path_config({"name": name, "timesteps": kind, **values})
    return make_path(config).timestep(torch.as_tensor(shares))


@pytest.mark.parametrize("name", LATEST)
def test_uniform_timesteps_are_the_shares_up_to_the_last_time_of_training(name):
    shares = torch.rand(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(timesteps(name, "uniform", shares), LATEST[name] * shares, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", LATEST)
@pytest.mark.parametrize(("mean", "std"), [(-0.8, 0.8), (0.0, 1.0), (1.3, 0.4)])
def test_logit_normal_timesteps_are_quantiles_of_that_distribution(name, mean, std):
    shares = np.linspace(1e-6, 1 - 1e-6, 4001)
    t = timesteps(name, "logit_normal", shares, logit_mean=mean, logit_std=std)
    np.testing.assert_allclose(t.numpy(), LATEST[name] * expit(norm.ppf(shares, mean, std)), rtol=1e-9)


def test_what_is_published_is_what_a_name_alone_stands_for():
    kinds = {name: path_config(name).timesteps for name in PATHS}
    assert kinds == {"linear": "uniform", "gvp": "uniform", "vp": "uniform", "jit": "logit_normal", "ddpm": "discrete"}
    jit = path_config("jit")
    assert (jit.logit_mean, jit.logit_std, jit.min_snr) == (-0.8, 0.8, None)
    assert path_config({"name": "jit"}) == jit == path_config({"name": "jit", "timesteps": None})


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("kind", ["uniform", "logit_normal", "discrete"])
def test_the_ends_of_the_shares_in_fp32_have_times_at_which_a_loss_is_finite(name, kind):
    if (kind == "discrete") != (name == "ddpm"):
        return
    t = timesteps(name, kind, torch.tensor([0.0, 2**-149, 2**-33, 0.5, 1 - 2**-24, 1.0]))
    assert t.dtype == torch.float32
    assert (t.diff() >= 0).all() and t.isfinite().all()
    path = PATHS[name]()
    x, noise, prediction = torch.randn(3, 6, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    prediction = torch.cat([prediction, prediction], dim=1) if name == "ddpm" else prediction
    assert path.loss(prediction, x, noise, path.noisy(x, noise, t), t).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_of_ddpms_1000_steps_comes_equally_often(dtype):
    shares = (torch.arange(50_000, dtype=torch.float64) + 0.5) / 50_000
    counts = timesteps("ddpm", "discrete", shares.to(dtype)).long().bincount()
    assert counts.tolist() == [50] * 1000


@pytest.mark.parametrize("spread", [0.0, 0.05, 0.2, 0.7])
@pytest.mark.parametrize("kind", ["uniform", "logit_normal", "discrete"])
def test_the_spread_in_a_group_keeps_the_distribution_of_every_image(spread, kind):
    rng = np.random.default_rng([3, int(100 * spread)])
    base, offset = rng.random((20_000, 1)), rng.random((20_000, 4))
    offset[:, 0] = 0.5
    shares = spread_quantiles(base, offset, spread).astype(np.float32)
    name = "ddpm" if kind == "discrete" else "jit"
    t = timesteps(name, kind, torch.from_numpy(shares).flatten()).view(-1, 4).double().numpy()
    for member in t.T:
        if kind == "discrete":
            assert chisquare(np.bincount(member.astype(int), minlength=1000)).pvalue > 1e-4
        elif kind == "logit_normal":
            assert kstest(np.log(member / (1 - member)), "norm", (-0.8, 0.8)).pvalue > 1e-4
        else:
            assert kstest(member, "uniform").pvalue > 1e-4
    assert (abs(t - t[:, :1]).max() > 0) == (spread > 0)
