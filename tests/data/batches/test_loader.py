from dataclasses import fields
from functools import cache

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.batches.batch import Batch
from data.batches.loader import BatchDataset, GroupSampler, load_batches
from data.batches.plan import GroupsConfig, Plan, plan_epoch, steps_per_epoch
from data.neighbors.exact import nearest_neighbors

WORLDS = (1, 2, 4, 8)


@st.composite
def planned(draw):
    """(plan of an epoch, steps in an epoch, micro-batch): plans are random numbers that 8 ranks can share."""
    size, steps = draw(st.integers(1, 8)), draw(st.integers(1, 4))
    unit = 8 * size
    batch = unit * draw(st.integers(1, 4))
    seed = draw(st.integers(0, 2**32))

    @cache
    def plan(epoch):
        rng = np.random.default_rng([seed, epoch])
        images = rng.permutation(steps * batch).reshape(steps, batch).astype(np.int32)
        grouped = rng.integers(batch // unit + 1, size=steps) * unit
        return Plan(images, grouped, size, np.zeros(int(grouped.sum()) // size, bool))

    micro = draw(st.none() | st.integers(1, 6).map(lambda groups: groups * size))
    return plan, steps, micro


def deal(case, world_size, first, last):
    """Micro-batches [rank][step][number]."""
    plan, steps, micro = case
    return [list(GroupSampler(plan, steps, first, last, rank, world_size, micro)) for rank in range(world_size)]


def kinds(micro_batches):
    return [(m.in_groups, len(m.images)) for m in micro_batches]


EXAMPLES = hypothesis.settings(max_examples=100, deadline=None)


@given(planned(), st.sampled_from(WORLDS), st.integers(1, 10))
@EXAMPLES
def test_at_every_step_all_ranks_have_the_same_kinds_and_sizes_in_the_same_order(case, world_size, last):
    ranks = deal(case, world_size, 0, last)
    for step in range(last):
        assert all(kinds(rank[step]) == kinds(ranks[0][step]) for rank in ranks)
        assert all(len(m.images) > 0 for m in ranks[0][step])


@given(planned(), st.integers(0, 10), st.integers(0, 10))
@EXAMPLES
def test_the_union_over_ranks_is_the_plan_at_every_world_size(case, first, number):
    plan, steps, _ = case
    for world_size in WORLDS:
        found = {}
        for rank in deal(case, world_size, first, first + number):
            assert len(rank) == number
            for micro in (micro for step in rank for micro in step):
                for i, image in enumerate(micro.images.tolist()):
                    assert micro.position + i not in found
                    found[micro.position + i] = (image, micro.in_groups)
            for step, micro_batches in enumerate(rank, start=first):
                assert {micro.step_position for micro in micro_batches} <= {step * len(plan(0).images[0])}
        expected, position = {}, first * len(plan(0).images[0])
        for step in range(first, first + number):
            epoch, row = divmod(step, steps)
            for column, image in enumerate(plan(epoch).images[row].tolist()):
                expected[position] = (image, column < plan(epoch).grouped[row])
                position += 1
        assert found == expected


@given(planned(), st.sampled_from(WORLDS))
@EXAMPLES
def test_no_group_straddles_ranks_or_micro_batches_and_none_is_over_the_limit(case, world_size):
    plan, steps, limit = case
    size = plan(0).group_size
    groups = set()
    for row, grouped in zip(plan(0).images, plan(0).grouped, strict=True):
        groups |= {tuple(group) for group in row[:grouped].reshape(-1, size).tolist()}
    for rank in deal(case, world_size, 0, steps):
        for micro in (micro for step in rank for micro in step):
            assert limit is None or len(micro.images) <= limit
            if micro.in_groups:
                dealt = {tuple(group) for group in micro.images.reshape(-1, size).tolist()}
                assert dealt <= groups
                groups -= dealt
    assert not groups


@given(planned(), st.sampled_from(WORLDS), st.integers(0, 12), st.integers(0, 12))
@EXAMPLES
def test_a_later_start_gives_the_tail_of_the_whole_sequence(case, world_size, first, number):
    plan, steps, micro = case
    for rank in range(world_size):
        whole = list(GroupSampler(plan, steps, 0, first + number, rank, world_size, micro))[first:]
        sampler = GroupSampler(plan, steps, first, first + number, rank, world_size, micro)
        tail = list(sampler)
        assert len(sampler) == len(tail) == number
        assert len(list(sampler)) == number  # it can be gone through again
        for a, b in zip(whole, tail, strict=True):
            assert [(m.position, m.in_groups, m.images.tolist()) for m in a] == [
                (m.position, m.in_groups, m.images.tolist()) for m in b
            ]


SETTINGS = [
    {"variant": "none", "size": 1},
    {"variant": "light", "size": 4},
    {"variant": "light", "size": 3, "share": 0.4, "mixing": "within_step", "query": "class"},
    {"variant": "full", "size": 2, "mixing": "within_step", "query": "random"},
    {"variant": "full", "size": 4, "threshold": 0.9},
]


def stream(random_images, settings, world_size, micro, workers=0, first=0):
    """What training would see: [rank][step] lists of batches over three epochs, and the sampler of each rank."""
    config = GroupsConfig(neighbors=12, spread=0.1, **settings)
    images = random_images("clustered", 130, 5, 1)
    graph = nearest_neighbors(images.features, 12)
    batch = 8 * config.size
    steps = steps_per_epoch(len(images), batch)

    def plan(epoch):
        return plan_epoch(config, images.label, graph, batch, 7, epoch)

    dataset = BatchDataset(images, config, 16, 7)
    samplers = [GroupSampler(plan, steps, first, 3 * steps, r, world_size, micro) for r in range(world_size)]
    return [list(load_batches(dataset, sampler, workers)) for sampler in samplers], samplers


def values(batch):
    return {field.name: getattr(batch, field.name) for field in fields(Batch)}


def same(a, b):
    """Whether two batches are bit-identical."""
    a, b = values(a), values(b)
    return all(torch.equal(a[n], b[n]) if isinstance(a[n], torch.Tensor) else a[n] == b[n] for n in a)


@pytest.mark.parametrize("settings", SETTINGS)
def test_an_image_of_the_stream_is_bit_identical_at_every_world_size_and_micro_batch(random_images, settings):
    def by_position(world_size, micro):
        found = {}
        dealt, samplers = stream(random_images, settings, world_size, micro)
        for steps, sampler in zip(dealt, samplers, strict=True):
            for batches, micro_batches in zip(steps, sampler, strict=True):
                for batch, where in zip(batches, micro_batches, strict=True):
                    for i in range(len(batch.u)):
                        parts = [
                            v[i].numpy().tobytes() if torch.is_tensor(v) else v
                            for name, v in values(batch).items()
                            if name != "fallbacks"
                        ]
                        found[where.position + i] = tuple(parts)
        return found

    size = settings["size"]
    expected = by_position(1, None)
    for world_size, micro in ((1, size), (2, None), (2, 3 * size), (4, 2 * size), (8, None)):
        assert by_position(world_size, micro) == expected
    assert len(expected) == 3 * (130 // (8 * size)) * 8 * size


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("world_size", [1, 4])
def test_all_batches_of_a_stream_are_whole_groups_of_one_kind(random_images, settings, world_size):
    dealt, _ = stream(random_images, settings, world_size, 2 * settings["size"])
    for batch in (batch for rank in dealt for step in rank for batch in step):
        assert len(batch.u) % batch.group_size == 0
        assert batch.group_size == (settings["size"] if batch.in_groups else 1)
        if settings["variant"] == "light":
            assert (batch.conditional == (not batch.in_groups)).all()


@pytest.mark.parametrize("settings", [SETTINGS[2], SETTINGS[4]])
def test_workers_change_nothing(random_images, settings):
    (alone,), _ = stream(random_images, settings, 1, 2 * settings["size"], workers=0)
    (helped,), _ = stream(random_images, settings, 1, 2 * settings["size"], workers=2)
    assert len(alone) == len(helped) > 3
    for a, b in zip(alone, helped, strict=True):
        assert len(a) == len(b)
        assert all(same(x, y) for x, y in zip(a, b, strict=True))


def test_a_resumed_stream_repeats_the_rest_bit_for_bit(random_images):
    for settings in SETTINGS:
        (whole, _), _ = stream(random_images, settings, 2, None)
        (rest, _), _ = stream(random_images, settings, 2, None, first=4)
        assert len(rest) == len(whole) - 4
        for a, b in zip(whole[4:], rest, strict=True):
            assert all(same(x, y) for x, y in zip(a, b, strict=True))


def test_batches_are_pinned_where_there_is_a_gpu_and_only_there(random_images):
    (steps,), _ = stream(random_images, SETTINGS[1], 1, None)
    gpu = torch.cuda.is_available()
    tensors = [value for batch in steps[0] for value in values(batch).values() if torch.is_tensor(value)]
    assert [tensor.is_pinned() for tensor in tensors] == [gpu] * len(tensors)
