"""Where groups act, and which network: by log-SNR, at the noisy end of every path, whichever way its time runs."""

import math
from dataclasses import replace
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch

from data.batches.batch import MicroBatch, make_batch
from data.batches.plan import GroupsConfig
from data.sets.arrays import ArrayImages
from models.backbones.embeddings import NULL_LABEL
from models.objectives.denoising import denoising_loss
from models.paths.registry import PATHS, LinearFlow, make_path, path_config
from models.sampling.generation import SampleConfig, sample_images
from models.sampling.guidance import Networks
from models.sampling.registry import SAMPLERS, fitting_samplers
from tests.models.gaussian import mixture

FITTING = [(sampler, path) for sampler in SAMPLERS for path in PATHS if sampler in fitting_samplers(PATHS[path]())]
EVERY = pytest.mark.parametrize(("sampler", "path"), FITTING)
LABEL, SLOT = torch.tensor([3, 3, 3, 3, 1, 1, 1, 1]), torch.tensor([5, 2, 7, 0, 1, 6, 3, 4])
EVERYWHERE, NOWHERE = (-math.inf, math.inf), (1e9, 2e9)
SEEDS = range(3)


class Recorder:
    """A smooth network for any path, that looks at the group; and its calls: time, label of the first image, group
    size."""

    def __init__(self, path, scale=1.0):
        self.path, self.scale, self.calls = path, scale, []

    def __call__(self, x, t, label, slot, group_size):
        self.calls.append((t[0].item(), label[0].item(), group_size))
        mean = x.unflatten(0, (-1, group_size)).mean(dim=1).repeat_interleave(group_size, dim=0)
        out = self.scale * (0.3 * x.sin() + 0.2 * mean + 0.01 * (label + slot).view(-1, 1, 1, 1))
        return torch.cat([out, out.cos()], dim=1) if self.path == "ddpm" else out


def noise(seed):
    return torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


def draw(step):
    return torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(1000 + step))


def sample(network, path, small=None, seed=0, **values):
    config = SampleConfig(**{"guidance": 2.0, "steps": 7, "tolerance": 1e-2, **values}).for_variant("light", 4, None)
    networks = Networks(network, small=small)
    made, *_ = sample_images(networks, PATHS[path](), config, noise(seed), LABEL, SLOT, config.guidance[0], draw)
    return made


def noisy_at(path, t):
    """More noise than image, by formulas of its own; not so where there is as much."""
    alpha, sigma = mixture(path, t)
    return bool(sigma > alpha * (1 + 1e-9))


def clean_at(path, t):
    """Less noise than image."""
    alpha, sigma = mixture(path, t)
    return bool(alpha > sigma * (1 + 1e-9))


@EVERY
def test_a_window_over_the_noisy_half_has_groups_there_and_nowhere_else(sampler, path):
    network = Recorder(path)
    sample(network, path, sampler=sampler, group_window=(-math.inf, -1e-6), cond_group_size=2, steps=20)
    for t, label, group_size in network.calls:
        assert group_size == ((4 if label == NULL_LABEL else 2) if noisy_at(path, t) else 1), t
    assert {noisy_at(path, t) for t, *_ in network.calls} == {True, False}
    assert noisy_at(path, network.calls[0][0])  # sampling begins with groups


@EVERY
def test_a_window_over_the_clean_half_has_groups_there_and_nowhere_else(sampler, path):
    network = Recorder(path)
    sample(network, path, sampler=sampler, group_window=(1e-6, math.inf), steps=20)
    for t, label, group_size in network.calls:
        assert group_size == (4 if clean_at(path, t) and label == NULL_LABEL else 1), t
    assert {clean_at(path, t) for t, *_ in network.calls} == {True, False}
    assert not clean_at(path, network.calls[0][0])


@EVERY
def test_guidance_in_the_noisy_half_happens_there_and_nowhere_else(sampler, path):
    network = Recorder(path)
    sample(network, path, sampler=sampler, interval=(-math.inf, -1e-6), steps=20)
    guided = {t for t, label, _ in network.calls if label == NULL_LABEL}
    assert guided == {t for t, *_ in network.calls if noisy_at(path, t)}


@EVERY
def test_a_window_over_everything_is_no_window_and_one_over_nothing_no_groups(sampler, path):
    plain = sample(Recorder(path), path, sampler=sampler)
    assert torch.equal(sample(Recorder(path), path, sampler=sampler, group_window=EVERYWHERE), plain)
    apart = sample(Recorder(path), path, sampler=sampler, cond_group_size=1, uncond_group_size=1)
    assert torch.equal(sample(Recorder(path), path, sampler=sampler, group_window=NOWHERE), apart)
    assert (plain - apart).abs().flatten(1).amax(dim=1).min() > 1e-4


@pytest.mark.parametrize("seed", SEEDS)
def test_so_it_is_for_real_networks(random_dit, random_jit, seed):
    for network, path in ((random_dit(seed), "linear"), (random_jit(seed), "jit")):
        own = partial(sample, network, path, seed=seed, steps=3)
        assert torch.equal(own(group_window=EVERYWHERE), own())
        assert torch.equal(own(group_window=NOWHERE), own(uncond_group_size=1))
        assert not torch.equal(own(group_window=(-math.inf, 0.0)), own())


@EVERY
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_all_steps_by_one_network_is_that_network(sampler, path, guidance):
    how = {"sampler": sampler, "guidance": guidance}
    large, small = Recorder(path), Recorder(path, 0.5)
    both = sample(large, path, small, small_share=0, **how)
    assert torch.equal(both, sample(Recorder(path), path, **how)) and not small.calls
    large, small = Recorder(path), Recorder(path, 0.5)
    both = sample(large, path, small, small_share=1, **how)
    assert torch.equal(both, sample(Recorder(path, 0.5), path, **how)) and not large.calls


@pytest.mark.parametrize(("sampler", "path"), [pair for pair in FITTING if pair[0] in ("euler", "ddim", "ddpm", "sde")])
def test_the_small_network_does_the_noisiest_steps_and_as_many_as_its_share(sampler, path):
    for steps, share in ((10, "0.4"), (100, "0.29"), (7, "0.5"), (50, "0.58"), (9, "0.1"), (12, "11/12")):
        large, small, share = Recorder(path), Recorder(path, 0.5), Fraction(share)
        sample(large, path, small, sampler=sampler, steps=steps, small_share=float(share), guidance=1.0)
        number = math.floor(share * steps)
        assert len(small.calls) == number and len(large.calls) == steps - number
        snr = [[alpha / sigma for alpha, sigma in (mixture(path, t) for t, *_ in net.calls)] for net in (small, large)]
        assert max(snr[0], default=-1) < min(snr[1], default=math.inf)


@pytest.mark.parametrize("sampler", ["heun", "pseudo_corrector", "dopri5"])
@pytest.mark.parametrize("path", ["linear", "gvp", "vp", "jit"])
def test_with_methods_of_more_stages_the_small_network_is_still_at_the_noisy_end(sampler, path):
    large, small = Recorder(path), Recorder(path, 0.5)
    sample(large, path, small, sampler=sampler, steps=10, small_share=0.4)
    start, end = PATHS[path].noisiest, PATHS[path].cleanest
    switch = start + 0.4 * (end - start)
    assert small.calls and max(t for t, *_ in small.calls) < switch * (1 + 1e-6)
    assert large.calls and min(t for t, *_ in large.calls) >= switch * (1 - 1e-6)


def training_batch(seed, window, path, spread=0.0, number=24, size=4):
    """A group batch whose groups share attention in a window of the path's log-SNR."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(number, 3, 6, 6)).astype(np.float32)
    images = ArrayImages(x, rng.integers(5, size=number), np.zeros((number, 1)), 5)
    config = GroupsConfig(variant="light", size=size, query="random", spread=spread)

    def in_window(share, position):
        log_snr = path.log_snr(path.timestep(share))
        return (window[0] <= log_snr) & (log_snr <= window[1])

    return make_batch(images, config, 8, seed, MicroBatch(40, np.arange(number), True), window and in_window)


@pytest.mark.parametrize("name", ["linear", "jit"])
@pytest.mark.parametrize("seed", SEEDS)
def test_training_in_a_window_is_with_groups_inside_of_it_and_without_outside(random_dit, random_jit, name, seed):
    """The loss of a group is that of no window, or that of groups of one; also if the window is all, or nothing."""
    net, path = {"linear": random_dit, "jit": random_jit}[name](seed), make_path(path_config({"name": name}))
    plain = training_batch(seed, None, path)
    assert plain.grouped is None
    whole, alone = (denoising_loss(net, path, replace(plain, group_size=size)) for size in (4, 1))
    assert (whole - alone).abs().min() > 0
    everywhere, nowhere = (training_batch(seed, window, path) for window in (EVERYWHERE, NOWHERE))
    assert (everywhere.grouped, nowhere.grouped) == (24, 0)
    assert torch.equal(denoising_loss(net, path, everywhere), whole)
    torch.testing.assert_close(denoising_loss(net, path, nowhere), alone)
    split = path.log_snr(path.timestep(plain.u)).median().item()
    part = training_batch(seed, (-math.inf, split), path)
    place = (part.noise[:, None] == plain.noise).flatten(2).all(dim=2).long().argmax(dim=1)  # where it was
    loss = denoising_loss(net, path, part)
    assert 0 < part.grouped < 24
    torch.testing.assert_close(loss[: part.grouped], whole[place][: part.grouped])
    torch.testing.assert_close(loss[part.grouped :], alone[place][part.grouped :])


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("spread", [0.0, 0.3])
def test_in_training_too_the_window_is_at_the_noisy_end(name, spread):
    """A group goes by its first image, whose share of noise is told by formulas of its own."""
    path = make_path(path_config({"name": name}))
    batch = training_batch(0, (-math.inf, 0.0), path, spread, number=200)
    first = path.timestep(batch.u[::4]).double().numpy()
    noisy = [noisy_at(name, t) for t in first]
    shared = batch.grouped // 4
    assert noisy == [True] * shared + [False] * (50 - shared)
    assert 0 < shared < 50


@pytest.mark.parametrize("seed", SEEDS)
def test_gradients_with_no_group_in_the_window_or_some_are_finite(random_dit, seed):
    path, net = LinearFlow(), random_dit(seed)
    for window in (NOWHERE, (-math.inf, 0.0)):
        net.zero_grad()
        denoising_loss(net, path, training_batch(seed, window, path)).mean().backward()
        assert all(parameter.grad.isfinite().all() for parameter in net.parameters())
