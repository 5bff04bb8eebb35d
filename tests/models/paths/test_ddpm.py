"""DDPM against a computation of its own, in float64 numpy: by Bayes' rule for two Gaussians, in precisions, and by
scipy's distributions. Equations are of arXiv 2006.11239 (Ho) and 2102.09672 (Nichol & Dhariwal)."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.special import expit
from scipy.stats import norm

from models.paths.ddpm import DDPM
from models.paths.registry import path_config
from tests.models.gaussian import BETA, mixture

SEEDS = range(4)
STEPS = (0, 1, 2, 10, 100, 500, 998, 999)


def posterior(x, x_t, t, before):
    """Mean and variance of q(x_before | x, x_t): the likelihood of x_t given x_before, times the prior given x."""
    kept = np.prod(1 - BETA[before + 1 : t + 1])  # x_t = sqrt(kept) x_before + sqrt(1 - kept) e
    prior = np.prod(1 - BETA[: before + 1])  # x_before = sqrt(prior) x + sqrt(1 - prior) e
    precision = kept / (1 - kept) + 1 / (1 - prior)
    mean = (np.sqrt(kept) / (1 - kept) * x_t + np.sqrt(prior) / (1 - prior) * x) / precision
    return mean, 1 / precision


def model_step(noise, share, x_t, t):
    """Mean (Ho, eq. 11) and variance (Nichol, eq. 15) of p(x_{t-1} | x_t) from predicted noise and v in [-1, 1]."""
    mean = (x_t - BETA[t] / np.sqrt(1 - np.prod(1 - BETA[: t + 1])) * noise) / np.sqrt(1 - BETA[t])
    at = max(t, 1)  # the first step's lower bound would be 0: the second's, as in the public code
    lower = posterior(0.0, 0.0, at, at - 1)[1]
    v = (share + 1) / 2
    return mean, BETA[t] ** v * lower ** (1 - v)


def kl(mean, variance, other_mean, other_variance):
    """Of two Gaussians, in nats."""
    ratio = variance / other_variance
    return ((mean - other_mean) ** 2 / other_variance + ratio - 1 - np.log(ratio)) / 2


def approximate_cdf(x):
    """A logistic function (1 + tanh y) / 2 = 1 / (1 + exp(-2y)) of a polynomial."""
    return expit(2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))


def decoder(x, mean, variance):
    """-log of the probability of x's bin among 256 on [-1, 1] (Ho, eq. 13), in nats; of the normal distribution as the
    public code approximates it."""
    std = np.sqrt(variance)
    upper = np.where(x > 0.999, 1.0, approximate_cdf((x - mean + 1 / 255) / std))
    lower = np.where(x < -0.999, 0.0, approximate_cdf((x - mean - 1 / 255) / std))
    return -np.log(np.maximum(upper - lower, 1e-12))


def expected_bound(x, x_t, t, noise, share):
    """Bits per number of the bound's term of step t, of one image."""
    mean, variance = model_step(noise, share, x_t, t)
    nats = decoder(x, mean, variance) if t == 0 else kl(*posterior(x, x_t, t, t - 1), mean, variance)
    return nats.mean() / np.log(2)


def setting(seed, steps=STEPS, dtype=torch.float64):
    """x on the 256 grey values, also the outermost; x_t, t, predicted noise near the true one, and v in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(steps), 2, 3, 3)
    x = torch.randint(256, shape, generator=generator, dtype=torch.float64) / 127.5 - 1
    x[:, 0, 0, 0], x[:, 1, 0, 0] = -1, 1
    noise, wrong = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    share = 2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1
    t = torch.tensor(steps, dtype=torch.float64)
    x_t = DDPM().noisy(x, noise, t)
    return tuple(part.to(dtype) for part in (x, noise, x_t, t, noise + 0.1 * wrong, share))


def test_the_schedule_is_1000_steps_of_linear_beta():
    alpha, sigma, *_ = DDPM().schedule(torch.arange(1000))
    expected_alpha, expected_sigma = mixture("ddpm", np.arange(1000))
    np.testing.assert_allclose(alpha.numpy(), expected_alpha, rtol=1e-12)
    np.testing.assert_allclose(sigma.numpy(), expected_sigma, rtol=1e-9)
    assert DDPM().alpha_bar(torch.tensor([-1, 0])).tolist() == pytest.approx([1, 1 - 1e-4], rel=1e-14)
    assert float(DDPM().alpha_bar(torch.tensor(999))) == pytest.approx(4.0358e-5, rel=1e-4)  # a published figure


@pytest.mark.parametrize("seed", SEEDS)
def test_the_posterior_is_bayes_rule_for_any_two_steps(seed):
    rng = np.random.default_rng(seed)
    for t in (1, 2, 17, 500, 999, *rng.integers(1, 1000, 5)):
        for before in {0, t - 1, t // 2, int(rng.integers(t))}:
            x, x_t = rng.normal(size=(2, 1, 2, 3, 3))
            times = (torch.tensor([float(part)]) for part in (t, before))
            mean, log_variance, log_beta = DDPM().posterior(torch.from_numpy(x), torch.from_numpy(x_t), *times)
            expected_mean, variance = posterior(x, x_t, t, before)
            np.testing.assert_allclose(mean.numpy(), expected_mean, rtol=1e-9, atol=1e-9)
            assert log_variance.exp().item() == pytest.approx(variance, rel=1e-8)
            assert log_beta.exp().item() == pytest.approx(1 - np.prod(1 - BETA[before + 1 : t + 1]), rel=1e-8)


@pytest.mark.parametrize("seed", SEEDS)
def test_mean_and_variance_of_the_models_step_are_those_of_the_papers(seed):
    _, _, x_t, t, noise, share = setting(seed)
    mean, log_variance = DDPM().reverse(torch.cat([noise, share], dim=1), x_t, t, t - 1)
    fixed, lower = DDPM(path_config({"name": "ddpm", "learns_variance": False})).reverse(noise, x_t, t, t - 1)
    for i, step in enumerate(STEPS):
        numbers = (noise[i].numpy(), share[i].numpy(), x_t[i].numpy(), step)
        expected, variance = model_step(*numbers)
        np.testing.assert_allclose(mean[i].numpy(), expected, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(log_variance[i].exp().numpy(), variance, rtol=1e-8)
        np.testing.assert_allclose(fixed[i].numpy(), expected, rtol=1e-9, atol=1e-9)
        assert lower[i].exp().item() == pytest.approx(model_step(noise[i].numpy(), -1.0, x_t[i].numpy(), step)[1])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("dtype", "rtol", "atol"), [(torch.float64, 1e-7, 1e-12), (torch.float32, 2e-3, 2e-6)])
def test_the_bound_and_the_loss_equal_the_independent_computation(seed, dtype, rtol, atol):
    x, noise, x_t, t, predicted, share = setting(seed, dtype=dtype)
    prediction, path = torch.cat([predicted, share], dim=1), DDPM()
    exact = setting(seed)
    expected = [
        expected_bound(exact[0][i].numpy(), exact[2][i].numpy(), step, exact[4][i].numpy(), exact[5][i].numpy())
        for i, step in enumerate(STEPS)
    ]
    np.testing.assert_allclose(path.bound(prediction, x, x_t, t).numpy(), expected, rtol=rtol, atol=atol)
    simple = (exact[4] - exact[1]).square().flatten(1).mean(dim=1).numpy()
    loss = path.loss(prediction, x, noise, x_t, t)
    assert loss.dtype == dtype
    np.testing.assert_allclose(loss.numpy(), simple + expected, rtol=rtol, atol=atol)
    only = DDPM(path_config({"name": "ddpm", "learns_variance": False})).loss(predicted, x, noise, x_t, t)
    np.testing.assert_allclose(only.numpy(), simple, rtol=1e-5)


def test_the_bound_of_the_true_variance_and_noise_is_0_and_grows_away_from_it():
    """Of any step but 0: v = -1 is the true posterior's variance."""
    x, noise, x_t, t, _, _ = setting(0, steps=STEPS[1:])
    bounds = [DDPM().bound(torch.cat([noise, torch.full_like(noise, v)], 1), x, x_t, t) for v in (-1, -0.5, 0.5, 1)]
    torch.testing.assert_close(bounds[0], torch.zeros_like(t), rtol=0, atol=1e-9)
    assert all((more > less).all() for less, more in pairwise(bounds[1:]))


def test_the_distribution_function_is_near_the_exact_one():
    x = np.linspace(-6, 6, 1001)
    assert abs(approximate_cdf(x) - norm.cdf(x)).max() == pytest.approx(1.79e-4, rel=0.01)


def test_the_probabilities_of_all_256_values_add_up_to_1():
    """The likelihood of step 0, for every grey value under one and the same model."""
    values = (torch.arange(256, dtype=torch.float64) / 127.5 - 1).view(256, 1, 1, 1)
    for middle in (-1.0, -0.99, 0.2, 1.0):
        x_t, zero = torch.full_like(values, middle), torch.zeros_like(values)
        bits = DDPM().bound(torch.cat([zero, zero], dim=1), values, x_t, torch.zeros(256))
        assert float((2**-bits).sum()) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_bound_teaches_the_variance_alone_and_the_simple_loss_the_noise_alone(seed):
    x, noise, x_t, t, predicted, share = setting(seed)
    prediction = torch.cat([predicted, share], dim=1).requires_grad_()
    of_bound = torch.autograd.grad(DDPM().bound(prediction, x, x_t, t).sum(), prediction)[0]
    of_loss = torch.autograd.grad(DDPM().loss(prediction, x, noise, x_t, t).sum(), prediction)[0]
    assert not of_bound[:, :2].any() and (of_bound[:, 2:] != 0).flatten(1).any(dim=1).all()
    torch.testing.assert_close(of_loss[:, :2], (predicted - noise) * 2 / noise[0].numel())
    assert torch.equal(of_loss[:, 2:], of_bound[:, 2:])


@pytest.mark.parametrize("seed", SEEDS)
def test_gradients_of_the_bound_are_those_of_finite_differences_also_at_step_0(seed):
    x, _, x_t, t, predicted, share = setting(seed, steps=(0, 1, 700))
    share.requires_grad_()

    def bound(share):
        return DDPM().bound(torch.cat([predicted, share], dim=1), x, x_t, t)

    assert torch.autograd.gradcheck(bound, (share,), eps=1e-6, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("steps", [2, 10, 250, 999, 1000])
def test_respaced_steps_are_evenly_spaced_from_999_to_0_and_end_at_the_data(steps):
    """As the public code spaces them: whole strides, added up and rounded."""
    public = [round(i * 999 / (steps - 1)) for i in range(steps)]
    assert DDPM().even_times(steps) == [*reversed(public), -1]
    assert len(set(public)) == steps


@pytest.mark.parametrize("steps", [-1, 0, 1, 1001])
def test_numbers_of_steps_that_ddpm_has_not_are_an_error(steps):
    with pytest.raises(ValueError, match=rf"sample.steps={steps}: .* set 2 to 1000"):
        DDPM().even_times(steps)


@pytest.mark.parametrize("steps", [2, 7, 50, 250])
def test_respacing_keeps_the_marginals(steps):
    """If x_t ~ q(x_t | x), then x_before drawn from the posterior ~ q(x_before | x): moments, exactly, at every step;
    and the betas of the respaced steps multiply up to the same alpha_bar."""
    times, path, x = torch.tensor(DDPM().even_times(steps), dtype=torch.float64), DDPM(), 0.8
    one, zero = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    left = 1.0
    for t, before in pairwise(times[:-1]):
        (alpha, sigma), (alpha_before, sigma_before) = (mixture("ddpm", int(step)) for step in (t, before))
        of_x, log_variance, log_beta = path.posterior(one, zero, t.view(1), before.view(1))
        of_x_t, *_ = path.posterior(zero, one, t.view(1), before.view(1))
        mean = of_x.item() * x + of_x_t.item() * alpha * x
        variance = log_variance.exp().item() + (of_x_t.item() * sigma) ** 2
        assert mean == pytest.approx(alpha_before * x, rel=1e-9)
        assert variance == pytest.approx(sigma_before**2, rel=1e-8)
        left *= 1 - log_beta.exp().item()
    assert left == pytest.approx((mixture("ddpm", 999)[0] / mixture("ddpm", 0)[0]) ** 2, rel=1e-9)
