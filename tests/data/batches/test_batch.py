from dataclasses import fields, replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, chisquare, kstest

from data.batches.batch import Batch, MicroBatch, make_batch, spread_quantiles
from data.batches.plan import GroupsConfig
from data.sets.arrays import ArrayImages

SLOTS = 16
VARIANTS = ("none", "light", "full")


def config_of(variant, size=4, **values):
    return GroupsConfig(variant=variant, size=1 if variant == "none" else size, query="random", **values)


def points(number):
    """Images of one pixel, for statistics."""
    return ArrayImages(np.zeros((number, 1, 1, 1), np.float32), np.arange(number), np.zeros((number, 1)), number)


def long_batch(config, grouped, number=20_000, seed=0):
    return make_batch(points(number), config, SLOTS, seed, MicroBatch(0, np.arange(number), grouped))


def tensors(batch):
    return {f.name: getattr(batch, f.name) for f in fields(Batch) if isinstance(getattr(batch, f.name), torch.Tensor)}


def uniform(values, low=0.0, high=1.0):
    return kstest(values, "uniform", args=(low, high - low)).pvalue > 1e-4


@given(
    st.sampled_from(VARIANTS),
    st.integers(1, 6),
    st.booleans(),
    st.integers(0, 2**40),
    st.integers(0, 2**40),
    st.lists(st.integers(0, 12), max_size=4),
)
@settings(max_examples=80, deadline=None)
def test_an_image_of_the_stream_is_the_same_however_the_stream_is_cut(
    random_images, variant, size, grouped, position, seed, cuts
):
    images, config = random_images("scattered", 50, 5, 0), config_of(variant, size, spread=0.2)
    size, grouped = config.size, grouped and variant != "none"
    chosen = np.random.default_rng(seed).permutation(50)[: 50 // size * size]

    def batch(start, stop):
        return make_batch(images, config, SLOTS, seed, MicroBatch(position + start, chosen[start:stop], grouped))

    borders = sorted({0, len(chosen), *(cut * size for cut in cuts if cut * size < len(chosen))})
    parts = [tensors(batch(start, stop)) for start, stop in pairwise(borders)]
    for name, whole in tensors(batch(0, len(chosen))).items():
        assert torch.equal(torch.cat([part[name] for part in parts]), whole), name


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("grouped", [False, True])
def test_a_batch_holds_the_images_asked_for_in_order(random_images, variant, grouped):
    images, config = random_images("scattered", 50, 5, 0), config_of(variant, 4)
    chosen = np.random.default_rng(0).permutation(50)[:12].astype(np.int32)
    batch = make_batch(images, config, SLOTS, 0, MicroBatch(100, chosen, grouped))
    assert torch.equal(batch.x, torch.tensor(images.x[chosen]))
    assert batch.label.tolist() == images.label[chosen].tolist()
    assert batch.group_size == (config.size if grouped else 1)
    assert batch.in_groups is grouped
    assert batch.noise.shape == batch.x.shape
    dtypes = {name: tensor.dtype for name, tensor in tensors(batch).items()}
    assert {dtypes[name] for name in ("x", "noise", "u")} == {torch.float32}
    assert {dtypes[name] for name in ("label", "slot")} == {torch.int64}
    assert dtypes["conditional"] == torch.bool
    assert {len(tensor) for tensor in tensors(batch).values()} == {12}


def test_noise_is_standard_normal_and_fresh_for_each_position_and_seed(random_images):
    images = random_images("scattered", 3000, 5, 0)

    def noise(position, seed):
        micro = MicroBatch(position, np.arange(3000), False)
        return make_batch(images, config_of("none"), SLOTS, seed, micro).noise.double()

    first, later, other = noise(0, 0), noise(3000, 0), noise(0, 1)
    for values in (first, later, other):
        number = values.numel()
        assert abs(values.mean()) < 5 / number**0.5
        assert abs(values.var() - 1) < 5 * (2 / number) ** 0.5
        assert kstest(values.flatten()[:20_000], "norm").pvalue > 1e-4
    for a, b in ((first, later), (first, other), (first[1:], first[:-1]), (first[..., 0], first[..., 1])):
        assert abs((a * b).mean()) < 5 / a.numel() ** 0.5
    assert torch.equal(noise(1, 0)[:-1], first[1:])


@pytest.mark.parametrize("spread", [0.0, 0.05, 0.2, 0.7, 1.0])
@pytest.mark.parametrize("seed", range(2))
def test_every_timestep_of_a_group_is_uniform_and_within_the_spread_of_the_first(spread, seed):
    t = long_batch(config_of("full", 4, spread=spread), True, seed=seed).u.double().view(-1, 4).numpy()
    assert t.min() >= 0
    assert t.max() <= 1
    offset = t[:, 1:] - t[:, :1]
    assert abs(offset).max() <= spread + 1e-7
    for member in t.T:
        assert uniform(member)
    if spread == 0:
        assert not offset.any()
    elif spread < 0.5:  # offsets are uniform where the ends of [0, 1] are far
        middle = offset[abs(t[:, 0] - 0.5) < 0.5 - spread]
        assert all(uniform(member, -spread, spread) for member in middle.T)
        assert abs(np.corrcoef(middle.T) - np.eye(3)).max() < 0.1


@pytest.mark.parametrize("variant", ["none", "light"])
def test_timesteps_of_images_alone_are_uniform_and_ignore_the_spread(variant):
    t = long_batch(config_of(variant, spread=0.3), False).u
    assert uniform(t)
    assert torch.equal(t, long_batch(config_of(variant, spread=0.0), False).u)
    assert abs(np.corrcoef(t[1:], t[:-1])[0, 1]) < 0.04


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_a_spread_timestep_is_an_offset_reflected_into_the_unit_interval(base, number, spread):
    t = float(spread_quantiles(np.array([base]), np.array([number]), spread)[0])
    free = base + (2 * number - 1) * spread
    assert 0 <= t <= 1
    assert t == pytest.approx(min((-free, free, 2 - free), key=lambda value: abs(value - 0.5)), abs=1e-12)
    assert abs(t - base) <= spread + 1e-12
    assert spread_quantiles(np.array([base]), np.array([0.5]), spread) == base


@pytest.mark.parametrize("drop", [0.0, 0.1, 0.5, 1.0])
def test_plain_diffusion_drops_the_class_of_each_image_by_itself(drop):
    kept = long_batch(config_of("none", drop=drop), False).conditional.numpy()
    assert binomtest(int((~kept).sum()), len(kept), drop).pvalue > 1e-4
    both = int((~kept[::2] & ~kept[1::2]).sum())
    assert binomtest(both, len(kept) // 2, drop**2).pvalue > 1e-4


@pytest.mark.parametrize("drop", [0.0, 0.1, 0.5, 1.0])
def test_full_drops_the_class_of_a_whole_group(drop):
    kept = long_batch(config_of("full", 4, drop=drop), True).conditional.view(-1, 4).numpy()
    assert (kept == kept[:, :1]).all()
    kept = kept[:, 0]
    assert binomtest(int((~kept).sum()), len(kept), drop).pvalue > 1e-4
    both = int((~kept[::2] & ~kept[1::2]).sum())
    assert binomtest(both, len(kept) // 2, drop**2).pvalue > 1e-4


@pytest.mark.parametrize("drop", [0.0, 0.1, 1.0])
def test_light_has_unconditional_groups_and_conditional_images_alone(drop):
    config = config_of("light", 4, drop=drop)
    assert not long_batch(config, True, number=400).conditional.any()
    assert long_batch(config, False, number=400).conditional.all()


def test_time_noise_slot_and_dropping_are_unrelated():
    batch = long_batch(config_of("none", drop=0.5), False)
    table = torch.stack([batch.u, batch.noise.flatten(), batch.slot, batch.conditional]).double()
    assert abs(table.corrcoef() - torch.eye(4)).max() < 5 / 20_000**0.5


@pytest.mark.parametrize(("size", "rows"), [(1, 16), (4, 16), (4, 4), (16, 16)])
@pytest.mark.parametrize("grouped", [False, True])
def test_slots_of_a_group_are_distinct_and_all_equally_likely(size, rows, grouped):
    config = config_of("light", size)
    micro = MicroBatch(0, np.arange(16_000), grouped)
    slot = make_batch(points(16_000), config, rows, 3, micro).slot.view(-1, size if grouped else 1).numpy()
    assert slot.min() >= 0
    assert slot.max() < rows
    assert (np.diff(np.sort(slot, axis=1), axis=1) > 0).all()
    for member in slot.T:
        assert chisquare(np.bincount(member, minlength=rows)).pvalue > 1e-4


@given(
    st.sampled_from(["light", "full"]),
    st.integers(1, 6),
    st.integers(0, 8),
    st.integers(0, 2**40),
    st.integers(0, 2**40),
)
@settings(max_examples=60, deadline=None)
def test_groups_in_the_window_come_first_and_every_image_keeps_what_is_its_own(variant, size, groups, position, seed):
    """The batch is that without a window, its groups in another order: each side in the order of the stream."""
    number, config = size * groups, config_of(variant, size, spread=0.3)
    micro, asked = MicroBatch(position, np.random.default_rng(seed).permutation(number), True, fallbacks=3), []

    def in_window(u, position):
        asked.append((u, position))
        return (u * 1000 % 1) < 0.5

    plain = make_batch(points(number), config, SLOTS, seed, micro)
    batch = make_batch(points(number), config, SLOTS, seed, micro, in_window)
    assert len(asked) == 1 and torch.equal(asked[0][0], plain.u[::size])  # a group goes by its first image
    inside = in_window(plain.u[::size], plain.position).repeat_interleave(size)
    order = torch.cat([inside.nonzero().flatten(), (~inside).nonzero().flatten()])
    assert batch.grouped == inside.sum()
    for name, tensor in tensors(batch).items():
        assert torch.equal(tensor, tensors(plain)[name][order]), name
    assert replace(batch, grouped=None, **tensors(plain)) == replace(plain, **tensors(plain))


@pytest.mark.parametrize("variant", ["none", "light"])
def test_images_alone_have_no_window(variant):
    def in_window(u, position):
        raise AssertionError("asked for images that share nothing")

    micro = MicroBatch(0, np.arange(8), False)
    batch = make_batch(points(8), config_of(variant), SLOTS, 0, micro, in_window)
    plain = make_batch(points(8), config_of(variant), SLOTS, 0, micro)
    assert batch.grouped is None
    assert all(torch.equal(tensor, tensors(plain)[name]) for name, tensor in tensors(batch).items())


class WithNumbers(ArrayImages):
    """Images whose extra tensors are their own numbers, with a sign where mirrored."""

    extra = {"number": (1,), "map": (2, 3), "unread": (5,)}
    mirrored = True

    def read_extra(self, numbers, draws, names):
        assert "unread" not in names
        signed = torch.from_numpy(np.where(draws.flip, -numbers, numbers))
        return {name: signed.view(-1, *[1] * len(self.extra[name])).expand(-1, *self.extra[name]) for name in names}


@pytest.mark.parametrize("window", [False, True])
def test_extra_tensors_of_the_images_asked_for_go_with_them(window):
    plain, images = points(8), WithNumbers(**vars(points(8)))
    chosen, config = np.array([5, 2, 7, 0, 1, 6]), config_of("full", 2)

    def in_window(u, position):
        assert position == 40
        return torch.tensor([False, True, True])

    def batch(images, extra=()):
        micro = MicroBatch(44, chosen, True, step_position=40)
        return make_batch(images, config, SLOTS, 0, micro, in_window if window else None, extra)

    found, without = batch(images, ("map", "number")), batch(images)
    expected = chosen[[2, 3, 4, 5, 0, 1]] if window else chosen
    assert found.label.tolist() == expected.tolist() and found.position == 40
    assert {name: tensor.shape for name, tensor in found.extra.items()} == {"map": (6, 2, 3), "number": (6, 1)}
    for values in found.extra.values():
        assert values.flatten(1)[:, 0].abs().tolist() == expected.tolist()
    assert (found.extra["number"] < 0).any() and (found.extra["number"] > 0).any()
    assert found.to(torch.device("meta")).extra["map"].device.type == "meta"
    assert without.extra == batch(plain).extra == {}
    assert all(torch.equal(tensor, tensors(without)[name]) for name, tensor in tensors(found).items())


def test_a_batch_moves_as_a_whole():
    batch = long_batch(config_of("full"), True, number=8)
    assert replace(batch, grouped=4).to(torch.device("cpu")).grouped == 4
    moved = batch.to(torch.device("cpu"))
    assert all(torch.equal(tensor, tensors(batch)[name]) for name, tensor in tensors(moved).items())
    assert (moved.group_size, moved.in_groups) == (4, True)
    away = tensors(batch.to(torch.device("meta")))
    assert {tensor.device.type for tensor in away.values()} == {"meta"}
    assert away.keys() == tensors(batch).keys()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="memory is pinned for a GPU")
def test_a_pinned_batch_is_the_same_batch():
    batch = long_batch(config_of("full"), True, number=8)
    pinned = batch.pin_memory()
    assert all(tensor.is_pinned() for tensor in tensors(pinned).values())
    assert all(torch.equal(tensor, tensors(batch)[name]) for name, tensor in tensors(pinned).items())
