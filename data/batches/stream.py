"""Streaming: each rank reads whole shards in turn and forms its groups among the images of a few, its window.

For sets too large to index on every rank, or storage that is slow at random reads. What a rank does is a pure function
of (seed, step, rank, world size), so a run resumes exactly at the same world size.
"""

from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from itertools import dropwhile

import numpy as np
from torch.utils.data import IterableDataset

from data.batches.batch import Batch, InWindow, MicroBatch, make_batch
from data.batches.loader import rank_pieces
from data.batches.plan import form_groups
from data.batches.windows import Stream, Window
from data.neighbors.exact import nearest_neighbors
from data.sets.streamed_latents import Pool, StreamedLatents
from data.workers import Loader


class StreamReader:
    """Opens one window after the other, the next one in the background, and hands out their images."""

    def __init__(self, source: StreamedLatents, stream: Stream, first_step: int, background: Executor) -> None:
        self._source, self._stream, self._background = source, stream, background
        used = stream.grouped_before(first_step), stream.single_before(first_step)
        self._windows = dropwhile(lambda w: w.total_grouped <= used[0] and w.total_single <= used[1], stream.windows())
        first = next(self._windows)
        self.pool: Pool | None = None
        self._grouped, self._single = np.empty(0, np.intp), np.empty(0, np.intp)
        self._fallback = np.empty(0, dtype=bool)
        self._next = background.submit(self._open, first)
        self.take(used[0] - first.total_grouped + first.grouped, used[1] - first.total_single + first.single)

    def take(self, grouped: int, single: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """So many images in groups, each contiguous, and single ones: numbers in `pool`, until the next call; and which
        of the groups are fallbacks."""
        while len(self._grouped) < grouped or len(self._single) < single:
            self._add(*self._next.result())
            self._next = self._background.submit(self._open, next(self._windows))
        taken = self._grouped[:grouped], self._single[:single], self._fallback[: grouped // self._stream.config.size]
        self._grouped, self._single = self._grouped[grouped:], self._single[single:]
        self._fallback = self._fallback[len(taken[2]) :]
        return taken

    def _add(self, pool: Pool, grouped: np.ndarray, single: np.ndarray, fallback: np.ndarray) -> None:
        left = np.concatenate([self._grouped, self._single])
        n, m = len(self._grouped), len(left)
        self.pool = self.pool.keep(left, pool) if m else pool
        self._grouped = np.concatenate([np.arange(n), m + grouped])
        self._single = np.concatenate([np.arange(n, m), m + single])
        self._fallback = np.concatenate([self._fallback, fallback])

    def _open(self, window: Window) -> tuple[Pool, np.ndarray, np.ndarray, np.ndarray]:
        """(images, which of them are in groups, which are single, which groups are fallbacks), in order of use."""
        stream, config = self._stream, self._stream.config
        pool = self._source.read_shards(window.shards)
        count = window.grouped // config.size
        graph = None
        if count and config.query == "similarity":
            graph = nearest_neighbors(pool.features, min(config.neighbors, len(pool.label) - 1))
        rng = np.random.default_rng([stream.seed, stream.world_size, stream.rank, window.number])
        groups, fallback = form_groups(config, pool.label, graph, count, rng)
        single = np.ones(len(pool.label), dtype=bool)
        single[groups] = False
        return pool, groups.ravel(), rng.permutation(np.flatnonzero(single))[: window.single], fallback


class StreamDataset(IterableDataset[list[Batch]]):
    """The batches of a rank's steps from `first_step` to before `last_step`."""

    def __init__(
        self,
        source: StreamedLatents,
        stream: Stream,
        max_group_size: int,
        micro_batch: int | None,
        first_step: int,
        last_step: int,
        in_window: InWindow | None = None,
        extra: tuple[str, ...] = (),
    ) -> None:
        self.in_window, self.extra = in_window, extra
        self.source, self.stream, self.max_group_size, self.micro_batch = source, stream, max_group_size, micro_batch
        self.first_step, self.last_step = first_step, last_step

    def __iter__(self) -> Iterator[list[Batch]]:
        stream, batch = self.stream, self.stream.global_batch
        with ThreadPoolExecutor(1) as background:
            reader = StreamReader(self.source, stream, self.first_step, background)
            for step in range(self.first_step, self.last_step):
                grouped, size = stream.grouped_at(step), stream.config.size
                share = grouped // stream.world_size, (batch - grouped) // stream.world_size
                groups, single, fallback = reader.take(*share)
                micro_batches, position = [], step * batch
                for start, stop in rank_pieces(0, grouped, stream.rank, stream.world_size, self.micro_batch):
                    first, last = (place - stream.rank * share[0] for place in (start, stop))
                    fallbacks = int(fallback[first // size : last // size].sum())
                    micro_batches.append(MicroBatch(position + start, groups[first:last], True, fallbacks, position))
                for start, stop in rank_pieces(grouped, batch, stream.rank, stream.world_size, self.micro_batch):
                    first, last = (place - grouped - stream.rank * share[1] for place in (start, stop))
                    micro_batches.append(MicroBatch(position + start, single[first:last], False, 0, position))
                make = partial(make_batch, reader.pool, stream.config, self.max_group_size, stream.seed)
                yield [make(micro, self.in_window, self.extra) for micro in micro_batches]


def stream_batches(dataset: StreamDataset, workers: int) -> Loader:
    """The batches of each step, in order. One worker reads the shards in turn; more would not help it.

    It is no fork: matrix products of MKL, which finds the neighbours, may hang in one of a process that had made some.
    """
    return Loader(dataset, min(workers, 1), multiprocessing_context="spawn" if workers else None)
