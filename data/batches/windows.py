"""Which shards each rank reads when streaming, in windows, and how their images are used. Pure arithmetic.

Each epoch has a new order of the shards, which are dealt to the ranks one by one forever, so every image appears once
in every pass over them. All of it is a function of (seed, rank, world size).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

import numpy as np

from data.batches.plan import GroupsConfig, grouped_before


@dataclass(frozen=True)
class Window:
    """The next shards that a rank reads, how many of their images it puts in groups, and how many it leaves single. The
    totals count all images of the stream up to the end of the window."""

    number: int
    shards: tuple[int, ...]
    grouped: int
    single: int
    total_grouped: int
    total_single: int


@dataclass(frozen=True)
class Stream:
    """A rank's part of a run over shards; shard i has `counts[i]` images."""

    counts: list[int]
    config: GroupsConfig
    global_batch: int
    seed: int
    rank: int
    world_size: int
    window: int

    def grouped_before(self, step: int) -> int:
        """Return the number of images in groups that this rank has used before a step."""
        return int(grouped_before(self.config, self.global_batch, step)) // self.world_size

    def grouped_at(self, step: int) -> int:
        """Return the number of images in groups in a step, over all ranks."""
        before, after = grouped_before(self.config, self.global_batch, np.array([step, step + 1]))
        return int(after - before)

    def single_before(self, step: int) -> int:
        """Return the number of single images that this rank has used before a step."""
        return step * self.global_batch // self.world_size - self.grouped_before(step)

    def windows(self) -> Iterator[Window]:
        """Yield all windows, from the start of the run. Their images are allotted by what the steps need: when the
        images so far are enough for t whole steps, those steps can be served (up to remainders smaller than a group),
        and the rest are for step t."""
        shards = self._shards()
        shard = next(shards)
        images = total_grouped = total_single = 0
        for number in count():
            window = []
            while len(window) < self.window and shard not in window:
                window.append(shard)
                shard = next(shards)
            size = sum(self.counts[shard] for shard in window)
            if self.config.share == 1:  # groups only: images that do not fill one are left out
                size -= size % self.config.size
            images += size
            step = images * self.world_size // self.global_batch
            wanted = min(self.grouped_before(step + 1), images - self.single_before(step))
            grouped = wanted // self.config.size * self.config.size - total_grouped
            grouped = min(grouped, size // self.config.size * self.config.size)  # the next one makes up for the rest
            total_grouped, total_single = total_grouped + grouped, total_single + size - grouped
            yield Window(number, tuple(window), grouped, size - grouped, total_grouped, total_single)

    def _shards(self) -> Iterator[int]:
        """Yield the shards of this rank. Every epoch has a new order; shards r, r + W, r + 2 W, ... of the endless
        sequence of all epochs go to rank r of W."""
        epoch, order = -1, np.empty(0, int)
        for place in count(self.rank, self.world_size):
            if place // len(self.counts) != epoch:
                epoch = place // len(self.counts)
                order = np.random.default_rng([self.seed, epoch]).permutation(len(self.counts))
            shard = int(order[place % len(self.counts)])
            if self.counts[shard]:  # otherwise all its images were rejected
                yield shard
