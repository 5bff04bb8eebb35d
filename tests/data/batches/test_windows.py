"""The arithmetic of streaming: which shards a rank reads, and what becomes of their images."""

from itertools import islice

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data.batches.plan import GroupsConfig
from data.batches.windows import Stream


@st.composite
def streams(draw):
    """The part of every rank of a run over uneven shards, [rank]."""
    variant = draw(st.sampled_from(["none", "light", "full"]))
    size = 1 if variant == "none" else draw(st.integers(1, 8))
    world_size = draw(st.sampled_from([1, 2, 4, 8]))
    share = None if variant == "none" else draw(st.none() | st.integers(1, 100).map(lambda percent: percent / 100))
    config = GroupsConfig(
        variant=variant,
        size=size,
        share=share,
        mixing=draw(st.sampled_from(["by_step", "within_step"])),
        query="random",
    )
    even = draw(st.booleans())
    count = st.integers(1, 8).map(lambda n: 16 * n) if even else st.integers(1, 60)
    counts = draw(st.lists(count, min_size=1, max_size=20))
    batch = 8 * size * draw(st.integers(1, 4))
    seed, window = draw(st.integers(0, 2**32)), draw(st.integers(1, 6))
    return [Stream(counts, config, batch, seed, rank, world_size, window) for rank in range(world_size)]


def images_of(stream, window):
    return sum(stream.counts[shard] for shard in window.shards)


EXAMPLES = settings(max_examples=200, deadline=None)
WINDOWS = 25


@given(streams())
@EXAMPLES
def test_no_window_holds_a_shard_twice_or_more_shards_than_it_may(ranks):
    for stream in ranks:
        for number, window in enumerate(islice(stream.windows(), WINDOWS)):
            assert window.number == number
            assert 1 <= len(window.shards) <= stream.window
            assert len(set(window.shards)) == len(window.shards)
            assert set(window.shards) <= set(range(len(stream.counts)))


ROUNDED = GroupsConfig(variant="full", size=3, share=0.9, query="random")


@given(streams())
@example([Stream([16, 16, 16], ROUNDED, 24, 0, 0, 1, 1)])
@example([Stream([1024], GroupsConfig(variant="light", size=6, share=0.99, query="random"), 144, 0, 0, 4, 1)])
@EXAMPLES
def test_a_window_gives_whole_groups_of_its_own_images_and_loses_none(ranks):
    """In `full`, those that do not fill a group are left out: fewer than a group."""
    for stream in ranks:
        size = stream.config.size
        for window in islice(stream.windows(), WINDOWS):
            images = images_of(stream, window)
            left_out = images % size if stream.config.share == 1 else 0
            assert window.grouped % size == 0
            assert 0 <= window.grouped <= images
            assert 0 <= window.single <= images
            assert window.grouped + window.single == images - left_out
            if stream.config.share in (0, 1):
                assert (window.single if stream.config.share else window.grouped) == 0


@given(streams())
@EXAMPLES
def test_totals_are_those_of_all_windows_so_far_and_never_fall(ranks):
    for stream in ranks:
        grouped = single = 0
        for window in islice(stream.windows(), WINDOWS):
            assert window.total_grouped >= grouped
            assert window.total_single >= single
            grouped, single = grouped + window.grouped, single + window.single
            assert (window.total_grouped, window.total_single) == (grouped, single)


@given(streams())
@EXAMPLES
def test_every_step_finds_what_it_needs_in_the_windows_so_far(ranks):
    """Of each window, count those images that fill whole groups: all steps that so many suffice for are served. Where
    groups fill all windows, that is every image."""
    for stream in ranks:
        images = 0
        for window in islice(stream.windows(), WINDOWS):
            images += images_of(stream, window) // stream.config.size * stream.config.size
            steps = images * stream.world_size // stream.global_batch
            assert window.total_grouped >= stream.grouped_before(steps)
            assert window.total_single >= stream.single_before(steps)


@given(streams(), st.integers(1, 4))
@EXAMPLES
def test_over_all_ranks_every_shard_comes_once_in_every_pass(ranks, passes):
    """In the order in which they are dealt: the first of each rank, then the second of each, and so on."""
    shards, count = [], passes * len(ranks[0].counts)
    for stream in ranks:
        read = (shard for window in stream.windows() for shard in window.shards)
        shards.append(list(islice(read, -(-count // len(ranks)))))
    dealt = [shard for together in zip(*shards, strict=True) for shard in together][:count]
    for i in range(0, count, len(ranks[0].counts)):
        assert sorted(dealt[i : i + len(ranks[0].counts)]) == list(range(len(ranks[0].counts)))


@given(streams(), st.integers(0, 30))
@EXAMPLES
def test_the_parts_of_all_ranks_are_the_steps(ranks, step):
    for stream in ranks:
        grouped, batch = stream.grouped_at(step), stream.global_batch
        assert 0 <= grouped <= batch
        used = stream.grouped_before(step + 1) - stream.grouped_before(step)
        alone = stream.single_before(step + 1) - stream.single_before(step)
        assert used * stream.world_size == grouped and alone * stream.world_size == batch - grouped
        assert used % stream.config.size == 0
        if stream.config.mixing == "by_step":
            assert grouped in (0, batch)


@given(streams())
@settings(max_examples=50, deadline=None)
def test_windows_are_the_same_each_time(ranks):
    for stream in ranks:
        assert list(islice(stream.windows(), 9)) == list(islice(stream.windows(), 9))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_order_of_shards_is_another_in_every_pass_and_with_every_seed(world_size):
    def order(seed, rank=0):
        stream = Stream([32] * 64, GroupsConfig(), 32, seed, rank, world_size, 4)
        return [shard for window in islice(stream.windows(), 3 * 16 // world_size) for shard in window.shards]

    part = 64 // world_size
    passes = np.reshape(order(0), (3, part))
    assert len({tuple(p) for p in passes}) == 3
    assert order(0) != order(1)
    if world_size > 1:
        assert not set(passes[0]) & set(order(0, rank=1)[:part])
        assert set(passes[0]) != set(passes[1]), "nor has a rank the same shards in each"


def test_every_shard_stands_anywhere_in_the_order():
    first = [next(Stream([1] * 8, GroupsConfig(), 32, seed, 0, 1, 1).windows()).shards[0] for seed in range(800)]
    assert abs(np.bincount(first, minlength=8) - 100).max() < 5 * 100**0.5
