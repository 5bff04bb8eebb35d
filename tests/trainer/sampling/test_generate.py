"""Samples belong to their numbers, however they are cut into batches; and where the groups of training act."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit
from scipy.stats import norm

from data.randomness import Purpose, draw, step_noise
from data.sets.registry import open_images
from models.backbones.registry import make_network
from models.paths.registry import PATHS
from models.sampling.registry import fitting_samplers
from tests.models.gaussian import mixture
from trainer.batches import make_batches
from trainer.config.tree import load_config
from trainer.monitor import Monitor
from trainer.ranks import Ranks
from trainer.sampling.generate import generate, generate_groups
from trainer.sampling.networks import Networks
from trainer.sampling.pictures import classes_shown

SHAPE, CPU = (1, 8, 8), torch.device("cpu")
FITTING = [(name, path) for path in PATHS for name in fitting_samplers(PATHS[path]()) if name != "dopri5"]


@pytest.fixture(scope="module")
def make(tiny, random_weights, tmp_path_factory):
    def make(*overrides):
        run = tmp_path_factory.mktemp("run")
        config = load_config(
            tiny, [f"run={run}", "sample.steps=5", "groups.size=4", "sample.tolerance=1e-3", *overrides]
        )
        size = (config.model, *SHAPE[:2], 10, config.path.predictions)
        return config, *(random_weights(make_network(*size), seed).eval() for seed in (0, 1))

    return make


@pytest.mark.parametrize(("sampler", "path"), FITTING)
def test_groups_in_one_batch_are_those_of_two_halves(make, sampler, path):
    """With guidance, groups, a window and a small network. Not dopri5's, which takes steps as a whole batch needs."""
    overrides = [f"path={path}", f"sample.sampler={sampler}", "sample.guidance=[1.2, 2.0, 3.0]"]
    config, network, small = make(*overrides, "sample.group_window=[-100, 0]")
    networks, groups, classes = Networks(network, small=small), np.array([7, 2, 5, 11]), np.array([3, 0, 1, 9])
    whole, *_ = generate_groups(networks, config, SHAPE, groups, classes, CPU)
    assert whole.shape == (16, *SHAPE) and whole.isfinite().all()
    halves = [generate_groups(networks, config, SHAPE, groups[i], classes[i], CPU)[0] for i in ([0, 1], [2, 3])]
    alone = [generate_groups(networks, config, SHAPE, groups[i], classes[i], CPU)[0] for i in ([0], [1], [2], [3])]
    for parts in (halves, alone):
        torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-4)
    other, *_ = generate_groups(networks, config, SHAPE, groups + 1, classes, CPU)
    assert (other - whole).abs().flatten(1).amax(dim=1).min() > 1e-3


@pytest.mark.parametrize("path", ["linear", "jit"])
def test_batches_change_what_dopri5_makes_within_its_tolerance_alone(make, path):
    """Of a network that is no stiff problem."""
    config, *_ = make(f"path={path}", "sample.sampler=dopri5", "sample.tolerance=1e-5")
    networks, groups, classes = Networks(lambda x, *others: x.sin()), np.array([7, 2, 5, 11]), np.array([3, 0, 1, 9])
    whole, *_ = generate_groups(networks, config, SHAPE, groups, classes, CPU)
    halves = [generate_groups(networks, config, SHAPE, groups[i], classes[i], CPU)[0] for i in ([0, 1], [2, 3])]
    torch.testing.assert_close(torch.cat(halves), whole, rtol=1e-3, atol=1e-3)


def test_noise_labels_slots_and_weights_are_those_of_the_groups(make):
    """What the network and the sampler get: a group's noise by its number, weights in turn."""
    config, *_ = make("path=linear", "sample.sampler=sde", "sample.guidance=[1.0, 3.0]", "sample.steps=3")
    groups, classes, calls = np.array([4, 7, 9]), np.array([3, 0, 5]), []

    def network(x, t, label, slot, group_size):
        calls.append((x.clone(), label, slot, group_size))
        return torch.where(label < 0, 0.0, 1.0).view(-1, 1, 1, 1).expand_as(x)

    made, evaluations, _ = generate_groups(Networks(network), config, SHAPE, groups, classes, CPU)
    numbers = (4 * groups[:, None] + np.arange(4)).ravel()
    drawn = draw(config.sample.seed, Purpose.SAMPLING, numbers, SHAPE, 4, config.model.slots)
    (x, label, slot, c), (_, null, same_slot, uc) = calls[:2]
    assert evaluations == 3 and len(calls) == 6
    assert torch.equal(x, torch.from_numpy(drawn.noise))
    assert label.tolist() == [3] * 4 + [0] * 4 + [5] * 4 and set(null.tolist()) == {-1}
    assert slot.tolist() == same_slot.tolist() == drawn.slot.tolist()
    assert (c, uc) == (1, 4)
    # groups 4, 7, 9 have weights 1, 3, 3; one step of the sde: v = w, score = -(x - t v) / (1 - t) = -x at t = 0
    weight = torch.tensor([1.0] * 4 + [3.0] * 8).view(-1, 1, 1, 1)
    z = torch.from_numpy(step_noise(config.sample.seed, numbers, SHAPE, 0))
    torch.testing.assert_close(calls[2][0], x + 0.48 * (weight - x) + (2 * 0.48) ** 0.5 * z, rtol=0, atol=1e-5)
    assert not torch.equal(made, x)


@pytest.mark.parametrize("batch", [1, 5, 64])
def test_all_samples_are_those_of_their_groups_whatever_the_batch(make, batch):
    config, network, _ = make("path=ddpm", "sample.sampler=ddpm", "sample.per_class=6", f"sample.batch={batch}")
    made, evaluations, _ = generate(Networks(network), config, open_images(config.data), Ranks(0, 1, CPU))
    assert made.shape == (10, 6, *SHAPE) and evaluations == 5
    for number in (0, 3, 9):  # a class has two groups of 4, cut to 6
        groups = np.array([2 * number, 2 * number + 1])
        own, *_ = generate_groups(Networks(network), config, SHAPE, groups, np.full(2, number), CPU)
        torch.testing.assert_close(made[number], own[:6], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("path", ["linear", "gvp", "vp", "jit", "ddpm"])
def test_in_a_runs_batches_groups_share_attention_at_the_noisy_end(tiny, tmp_path, alone, path):
    """Told by formulas of their own, on the batches that the trainer makes of a config."""
    sampler = "ddim" if path == "ddpm" else "heun"
    window = ["groups.window=[-100, 0]", f"path={path}", f"sample.sampler={sampler}", "groups.spread=0"]
    config = load_config(tiny, [f"run={tmp_path}", *window])
    images, ranks = open_images(config.data), Ranks(0, 1, CPU)
    counts = []
    with Monitor(tmp_path, (), ranks, 0, 0, 640) as monitor:
        for micro_batches in make_batches(config, images, ranks, 0, 8, monitor.plan):
            for batch in (batch for batch in micro_batches if batch.in_groups):
                share = batch.u.double().numpy()
                published = {"ddpm": np.floor(share * 1000), "jit": expit(norm.ppf(share, -0.8, 0.8))}
                t = published.get(path, share)
                alpha, sigma = mixture(path, t)
                assert (sigma > alpha).tolist() == [True] * batch.grouped + [False] * (len(t) - batch.grouped)
                counts.append((batch.grouped, len(t)))
    assert 0 < sum(sharing for sharing, _ in counts) < sum(number for _, number in counts)


@pytest.mark.parametrize("guidance", ["[1.5, 1.0]", "[1.0]", "[2.0, 1.0, 1.0]"])
@pytest.mark.parametrize("world_size", [3, 8])
def test_all_ranks_call_the_network_as_often(make, monkeypatch, guidance, world_size):
    """Which a sharded network needs, whatever the weights of a rank's groups are."""
    config, network, _ = make("path=linear", f"sample.guidance={guidance}", "sample.per_class=1", "sample.batch=4")
    monkeypatch.setattr(dist, "all_gather_into_tensor", lambda out, own: out.copy_(torch.cat([own] * world_size)))
    calls = []
    for rank in range(world_size):

        def counted(*arguments, rank=rank):
            calls.append(rank)
            return network(*arguments)

        generate(Networks(counted), config, open_images(config.data), Ranks(rank, world_size, CPU))
    assert len({calls.count(rank) for rank in range(world_size)}) == 1


def test_some_classes_alone_have_the_images_that_they_have_among_all(make):
    config, network, _ = make("path=linear", "sample.per_class=6")
    images, ranks = open_images(config.data), Ranks(0, 1, CPU)
    whole, *_ = generate(Networks(network), config, images, ranks)
    some, *_ = generate(Networks(network), config, images, ranks, classes=range(1, 10, 4))
    assert torch.equal(some, whole[[1, 5, 9]])


@given(st.integers(1, 30_000), st.integers(1, 1024))
def test_the_classes_shown_fit_a_picture_and_are_spread_over_all(number, height):
    shown = classes_shown(number, height)
    side = max(height, 32)
    assert shown[0] == 0 and len(shown) * side <= max(4096, side)
    assert len(shown) == number or len(shown) * side > 4096 // 2 - side, "as many as fit, nearly"
    assert number - shown[-1] <= shown.step
