"""The stochastic samplers, sde and ddpm, and ddim on ddpm: mean and spread of samples of Gaussian data at every time
they visit, against the closed form; and one step of the sde by hand."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from models.paths.registry import PATHS
from models.sampling.registry import SAMPLERS
from models.sampling.samplers import Problem, SamplerConfig, State
from tests.models.gaussian import FLOWS, GAUSSIANS, Gaussian, mixture, normal, slopes

NUMBER = 20_000
ERROR = 5 / NUMBER**0.5  # five standard errors of a mean, in standard deviations
DIFFUSIONS = ("sigma", "linear", "constant", "decreasing", "rising-falling", "sbdm")


def diffusion(kind, path, t, norm):
    """w(t), of the table in the paper and of its code, written out for each path."""
    match kind:
        case "constant":
            return norm
        case "sigma":
            return norm * mixture(path, t)[1]
        case "linear":
            return norm * (1 - t)
        case "decreasing":
            return (norm * np.cos(np.pi * t) + 1) ** 2 / 4
        case "rising-falling":
            return norm * np.sin(np.pi * t) ** 2
    sbdm = {"gvp": math.pi / 2 / math.tan(math.pi / 2 * t), "vp": (0.1 + (1 - t) * 19.9) / 2}
    return norm * sbdm.get(path, (1 - t) / t)


def run(sampler, denoise, path, x, times, draw, settings):
    return SAMPLERS[sampler].run(Problem(denoise, path, times, draw, settings), State(x)).x


def draws(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda i: torch.randn(2, 1, 1, NUMBER // 2, generator=generator, dtype=torch.float64)


def standard(seed=0):
    z = normal(NUMBER, seed)
    return (z - z.mean()) / z.std()


@pytest.mark.parametrize("path", FLOWS)
@pytest.mark.parametrize("kind", DIFFUSIONS)
def test_a_step_of_the_sde_is_that_of_the_paper(path, kind):
    """dx = (v + w score) dt + sqrt(2 w) dW, and no noise in the last step."""
    gaussian, x, z, norm = GAUSSIANS[1], normal(64), normal(64, 1), 0.7
    times, seen = [0.3, 0.45, 1.0], []
    denoise = gaussian.denoise(path)
    settings = SamplerConfig(diffusion=kind, diffusion_norm=norm)
    out = run("sde", lambda x, t: seen.append(x) or denoise(x, t), PATHS[path](), x, times, lambda i: z, settings)
    for before, after, t, step, noise in ((x, seen[1], 0.3, 0.15, z), (seen[1], out, 0.45, 0.55, 0)):
        best, w = gaussian.best(path, before, t), diffusion(kind, path, t, norm)
        expected = before + step * (best["velocity"] + w * best["score"]) + math.sqrt(2 * w * step) * noise
        torch.testing.assert_close(after, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("path", FLOWS)
@pytest.mark.parametrize("kind", DIFFUSIONS)
def test_the_sde_keeps_mean_and_spread_of_the_data_up_to_its_last_step(path, kind):
    """Up to the last step, which takes the mean without noise: from its closed form follows what it makes of both.
    With sbdm the first steps of linear and gvp are too long for its diffusion there, (1 - t) / t; it recovers."""
    gaussian, settings, steps = Gaussian(1.5, 0.5), SamplerConfig(diffusion=kind), 200
    times, errors = SAMPLERS["sde"].times(PATHS[path](), steps, settings), {}
    denoise = gaussian.denoise(path)

    def observed(x, t):
        mean, std = gaussian.marginal(path, t)
        errors[t] = max(abs(x.mean().item() - mean) / std, abs(x.std().item() / std - 1))
        return denoise(x, t)

    mean, std = gaussian.marginal(path, times[0])
    out = run("sde", observed, PATHS[path](), mean + std * standard(), times, draws(1), settings)
    assert len(errors) == steps
    late = 0.2 if kind == "sbdm" else 0
    assert max(error for t, error in errors.items() if t >= late) < ERROR
    mean, std = gaussian.marginal(path, 0.96)
    (alpha, sigma), (d_alpha, d_sigma) = mixture(path, 0.96), slopes(path, 0.96)
    pull = (d_alpha * alpha * gaussian.std**2 + d_sigma * sigma - diffusion(kind, path, 0.96, 1)) / std**2
    assert out.mean().item() == pytest.approx(mean + 0.04 * d_alpha * gaussian.mean, abs=ERROR * std)
    assert out.std().item() == pytest.approx(std * (1 + 0.04 * pull), rel=ERROR)


@pytest.mark.parametrize("path", FLOWS)
@pytest.mark.parametrize("kind", ["sigma", "sbdm"])
@pytest.mark.parametrize("steps", [1, 2, 30, 250])
def test_the_sde_ends_with_a_step_of_0_04_and_is_even_before_it(path, kind, steps):
    times = SAMPLERS["sde"].times(PATHS[path](), steps, SamplerConfig(diffusion=kind))
    assert len(times) == steps + 1 and times[-1] == 1
    assert times[0] == (1e-3 if kind == "sbdm" else 0)
    if steps > 1:
        assert times[-2] == pytest.approx(0.96)
        even = np.diff(times[:-1])
        assert even == pytest.approx(np.full(steps - 1, even[0]))


def with_true_variance(gaussian, steps):
    """The best network of ddpm that also knows the variance of its step: that of q(x_before | x, x_t), plus what is not
    known of x."""
    before_of = dict(pairwise(steps))

    def denoise(x_t, t):
        (alpha, sigma), (alpha_before, sigma_before) = mixture("ddpm", t), mixture("ddpm", before_of[t])
        beta = 1 - (alpha / alpha_before) ** 2
        lower = beta * sigma_before**2 / sigma**2
        known = alpha_before * beta / sigma**2  # how much the mean moves with x
        variance = lower + known**2 * (gaussian.std * sigma) ** 2 / (alpha**2 * gaussian.std**2 + sigma**2)
        noise = gaussian.prediction("ddpm", x_t, t)
        lowest = lower if lower > 0 else 5e-5  # the last step: its variance goes unused
        share = (math.log(variance) - math.log(lowest)) / (math.log(beta) - math.log(lowest))
        return torch.cat([noise, torch.full_like(noise, 2 * share - 1)], dim=1)

    return denoise


@pytest.mark.parametrize(
    ("steps", "gaussian"), [*((steps, g) for steps in (5, 25) for g in GAUSSIANS), (250, GAUSSIANS[1])]
)
def test_ancestral_sampling_has_the_marginals_of_the_path_at_every_step(gaussian, steps):
    """With the true variance, in any number of steps. The last takes the mean, and lacks what is not known of x."""
    path, settings, errors = PATHS["ddpm"](), SamplerConfig(), []
    times = SAMPLERS["ddpm"].times(path, steps, settings)
    denoise = with_true_variance(gaussian, times)

    def observed(x, t):
        mean, std = gaussian.marginal("ddpm", int(t))
        errors.append(max(abs(x.mean().item() - mean) / std, abs(x.std().item() / std - 1)))
        return denoise(x, t)

    mean, std = gaussian.marginal("ddpm", 999)
    out = run("ddpm", observed, path, mean + std * standard(), times, draws(2), settings)
    assert len(errors) == steps
    assert max(errors) < ERROR
    assert abs(out.mean().item() - gaussian.mean) < ERROR * gaussian.std
    alpha, sigma = mixture("ddpm", 0)
    mean_of_data = alpha * gaussian.std / math.hypot(alpha * gaussian.std, sigma)
    assert out.std().item() / gaussian.std == pytest.approx(mean_of_data, abs=ERROR)


def test_ancestral_sampling_draws_noise_for_every_step_but_the_last():
    path, gaussian, asked = PATHS["ddpm"](), GAUSSIANS[0], []
    times = SAMPLERS["ddpm"].times(path, 6, SamplerConfig())
    denoise = with_true_variance(gaussian, times)
    run("ddpm", denoise, path, normal(8), times, lambda i: asked.append(i) or normal(8), SamplerConfig())
    assert asked == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("gaussian", GAUSSIANS, ids=str)
def test_ddim_takes_the_exact_marginal_of_ddpm_to_that_of_the_data(gaussian):
    path, errors = PATHS["ddpm"](), []
    x = normal(64)
    for steps in (125, 250, 500, 1000):
        times = SAMPLERS["ddim"].times(path, steps, SamplerConfig())
        out = run("ddim", gaussian.denoise("ddpm"), path, x, times, None, SamplerConfig())
        errors.append((out - gaussian.transport("ddpm", x, 999, -1)).abs().max().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.02
    assert errors[0] / errors[-1] == pytest.approx(8, rel=0.2)  # of order 1


def test_ddim_on_ddpm_is_song_et_als_step():
    """x_before = sqrt(bar_before) (x_t - sqrt(1 - bar) e) / sqrt(bar) + sqrt(1 - bar_before) e, at the variance 0."""
    x, e = normal(64), normal(64, 1)
    bar, bar_before = (np.prod(1 - np.linspace(1e-4, 0.02, 1000)[: t + 1]) for t in (700, 300))
    both = torch.cat([e, normal(64, 2)], dim=1)
    out = run("ddim", lambda x, t: both, PATHS["ddpm"](), x, [700.0, 300.0], None, SamplerConfig())
    expected = bar_before**0.5 * (x - (1 - bar) ** 0.5 * e) / bar**0.5 + (1 - bar_before) ** 0.5 * e
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("path", FLOWS)
def test_slopes_of_the_closed_form_are_those_that_sbdm_is_written_with(path):
    for t in (0.1, 0.5, 0.9):
        (alpha, sigma), (d_alpha, d_sigma) = mixture(path, t), slopes(path, t)
        assert diffusion("sbdm", path, t, 1) == pytest.approx(d_alpha / alpha * sigma**2 - sigma * d_sigma)
