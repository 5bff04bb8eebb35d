"""Random numbers that belong to an image of the stream, not to a process: the same at any world size, after any resume.

A counter-based generator (Philox; Salmon et al., "Parallel random numbers: as easy as 1, 2, 3") keyed by the seed, with
the position in the high word of its counter: every position has 2^192 numbers of its own.
"""

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """What the numbers are for: streams of one seed are independent."""

    TRAINING = 0
    SAMPLING = 1


def generator(seed: int, stream: Stream, position: int) -> np.random.Generator:
    """The generator of one position (image number, from 0) of a stream."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, stream], np.uint64), counter=[0, 0, 0, position]))


def draw_slots(rng: np.random.Generator, group_size: int, max_group_size: int) -> np.ndarray:
    """Rows of the sample embedding for one group, (group_size,) int64, without replacement: no slot is special."""
    return rng.permutation(max_group_size)[:group_size]
