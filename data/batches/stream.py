"""Streaming: each rank reads whole shards in turn and forms its groups among the images of a few shards, its window.

It is for sets too large to index on every rank, or storage that is slow at random reads. What a rank does is a pure
function of (seed, step, rank, world size), so a run resumes exactly at the same world size.
"""

from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from itertools import dropwhile
from typing import Protocol, Self

import numpy as np
from torch.utils.data import IterableDataset

from data.batches.batch import Batch, MicroBatch, make_batch
from data.batches.loader import rank_pieces
from data.batches.plan import form_groups
from data.batches.pool import Pool
from data.batches.steps import Steps
from data.batches.windows import Stream, Window
from data.workers import Loader


class ShardPool(Pool, Protocol):
    """The images of some shards, in memory."""

    def keep(self, numbers: np.ndarray, new: Self) -> Self:
        """Return these images followed by those of `new`, for reading only, not for finding neighbors."""
        ...


class Shards(Protocol):
    """Images in shards, which are read whole; shard i has `counts[i]` images."""

    counts: list[int]

    def read_shards(self, shards: tuple[int, ...], extra: tuple[str, ...]) -> ShardPool:
        """Return all images of some shards, with the extra tensors `extra`."""
        ...


class StreamReader:
    """Open one window after another, the next one in the background, and hand out their images."""

    def __init__(
        self, shards: Shards, stream: Stream, first_step: int, background: Executor, extra: tuple[str, ...] = ()
    ) -> None:
        self._extra = extra
        self._shards, self._stream, self._background = shards, stream, background
        used = stream.grouped_before(first_step), stream.single_before(first_step)
        self._windows = dropwhile(lambda w: w.total_grouped <= used[0] and w.total_single <= used[1], stream.windows())
        first = next(self._windows)
        self._pool: ShardPool | None = None
        self._grouped, self._single = np.empty(0, np.intp), np.empty(0, np.intp)
        self._fallback = np.empty(0, dtype=bool)
        self._next = background.submit(self._open, first)
        self.take(used[0] - first.total_grouped + first.grouped, used[1] - first.total_single + first.single)

    def take(self, grouped: int, single: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the numbers of `grouped` images in contiguous groups and of `single` single images, and which groups
        are fallbacks. Numbers refer to `pool` and are valid until the next call."""
        while len(self._grouped) < grouped or len(self._single) < single:
            self._add(*self._next.result())
            self._next = self._background.submit(self._open, next(self._windows))
        taken = self._grouped[:grouped], self._single[:single], self._fallback[: grouped // self._stream.config.size]
        self._grouped, self._single = self._grouped[grouped:], self._single[single:]
        self._fallback = self._fallback[len(taken[2]) :]
        return taken

    @property
    def pool(self) -> ShardPool:
        """The images that the numbers of the last `take` refer to."""
        assert self._pool is not None, "nothing is taken yet"
        return self._pool

    def _add(self, pool: ShardPool, grouped: np.ndarray, single: np.ndarray, fallback: np.ndarray) -> None:
        left = np.concatenate([self._grouped, self._single])
        n, m = len(self._grouped), len(left)
        self._pool = self._pool.keep(left, pool) if self._pool and m else pool
        self._grouped = np.concatenate([np.arange(n), m + grouped])
        self._single = np.concatenate([np.arange(n, m), m + single])
        self._fallback = np.concatenate([self._fallback, fallback])

    def _open(self, window: Window) -> tuple[ShardPool, np.ndarray, np.ndarray, np.ndarray]:
        """Return the images, which are in groups, which are single, and which groups are fallbacks, in order of use."""
        stream, config = self._stream, self._stream.config
        pool = self._shards.read_shards(window.shards, self._extra)
        count = window.grouped // config.size
        graph = None
        if count and config.query == "similarity":
            graph = pool.neighbors(config.neighbors)
        rng = np.random.default_rng([stream.seed, stream.world_size, stream.rank, window.number])
        groups, fallback = form_groups(config, pool.label, graph, count, rng)
        single = np.ones(len(pool.label), dtype=bool)
        single[groups] = False
        return pool, groups.ravel(), rng.permutation(np.flatnonzero(single))[: window.single], fallback


class StreamDataset(IterableDataset[list[Batch]]):
    """The batches of a rank's steps, formed in windows of `window` shards."""

    def __init__(self, shards: Shards, window: int, steps: Steps) -> None:
        self.shards, self.steps = shards, steps
        part = steps.global_batch, steps.seed, steps.rank, steps.world_size
        self.stream = Stream(shards.counts, steps.groups, *part, window)

    def __iter__(self) -> Iterator[list[Batch]]:
        steps, stream, batch = self.steps, self.stream, self.steps.global_batch
        with ThreadPoolExecutor(1) as background:
            reader = StreamReader(self.shards, stream, steps.first, background, steps.extra)
            for step in range(steps.first, steps.last):
                grouped, size = stream.grouped_at(step), stream.config.size
                share = grouped // stream.world_size, (batch - grouped) // stream.world_size
                groups, single, fallback = reader.take(*share)
                micro_batches, position = [], step * batch
                for start, stop in rank_pieces(0, grouped, stream.rank, stream.world_size, steps.micro_batch):
                    first, last = (place - stream.rank * share[0] for place in (start, stop))
                    fallbacks = int(fallback[first // size : last // size].sum())
                    micro_batches.append(MicroBatch(position + start, groups[first:last], True, fallbacks, position))
                for start, stop in rank_pieces(grouped, batch, stream.rank, stream.world_size, steps.micro_batch):
                    first, last = (place - grouped - stream.rank * share[1] for place in (start, stop))
                    micro_batches.append(MicroBatch(position + start, single[first:last], False, 0, position))
                make = partial(make_batch, reader.pool, stream.config, steps.max_group_size, stream.seed)
                yield [make(micro, steps.in_window, steps.extra) for micro in micro_batches]


def stream_batches(shards: Shards, window: int, steps: Steps) -> Loader:
    """Return a loader of the batches of a rank's steps, formed in windows of `window` shards. One worker reads the
    shards in turn; more would not help.

    The worker is spawned, not forked: it finds neighbors with MKL's matrix products, which may hang in a forked process
    if its parent has computed some.
    """
    context = "spawn" if steps.workers else None
    return Loader(StreamDataset(shards, window, steps), min(steps.workers, 1), multiprocessing_context=context)
