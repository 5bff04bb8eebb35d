"""Which shards each rank reads in streaming, in windows, and what becomes of their images. Pure arithmetic.

The shards come in a new order in each epoch, dealt to the ranks one by one without end, so every image comes once in
every pass over them. All of it is a function of (seed, rank, world size).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

import numpy as np

from data.batches.plan import GroupsConfig, grouped_before


@dataclass(frozen=True)
class Window:
    """The next shards that a rank reads, and how many of their images it puts in groups, and leaves single. The totals
    are of the stream up to its end."""

    number: int
    shards: tuple[int, ...]
    grouped: int
    single: int
    total_grouped: int
    total_single: int


@dataclass(frozen=True)
class Stream:
    """A rank's part of a run over shards with `counts` images."""

    counts: list[int]
    config: GroupsConfig
    global_batch: int
    seed: int
    rank: int
    world_size: int
    window: int

    def grouped_before(self, step: int) -> int:
        """Images in groups that this rank has used before a step."""
        return int(grouped_before(self.config, self.global_batch, step)) // self.world_size

    def grouped_at(self, step: int) -> int:
        """Images in groups in a step, over all ranks."""
        before, after = grouped_before(self.config, self.global_batch, np.array([step, step + 1]))
        return int(after - before)

    def single_before(self, step: int) -> int:
        """Single images that this rank has used before a step."""
        return step * self.global_batch // self.world_size - self.grouped_before(step)

    def windows(self) -> Iterator[Window]:
        """All windows, from the start of the run. Their images are shared out by what the steps need: when the images
        so far are enough for t whole steps, these can be served (but for remainders less than a group), and the rest is
        for step t."""
        shards = self._shards()
        shard = next(shards)
        images = total_grouped = total_single = 0
        for number in count():
            window = []
            while len(window) < self.window and shard not in window:
                window.append(shard)
                shard = next(shards)
            size = sum(self.counts[shard] for shard in window)
            if self.config.share == 1:  # groups alone: what does not fill one is left out
                size -= size % self.config.size
            images += size
            step = images * self.world_size // self.global_batch
            wanted = min(self.grouped_before(step + 1), images - self.single_before(step))
            grouped = wanted // self.config.size * self.config.size - total_grouped
            grouped = min(grouped, size // self.config.size * self.config.size)  # the next one makes up for the rest
            total_grouped, total_single = total_grouped + grouped, total_single + size - grouped
            yield Window(number, tuple(window), grouped, size - grouped, total_grouped, total_single)

    def _shards(self) -> Iterator[int]:
        """Shards of this rank: every epoch has a new order, and shard number r, r + W, r + 2 W, ... of the endless
        sequence of all epochs go to rank r of W."""
        epoch, order = -1, np.empty(0, int)
        for place in count(self.rank, self.world_size):
            if place // len(self.counts) != epoch:
                epoch = place // len(self.counts)
                order = np.random.default_rng([self.seed, epoch]).permutation(len(self.counts))
            shard = int(order[place % len(self.counts)])
            if self.counts[shard]:  # else all its images were rejected
                yield shard
