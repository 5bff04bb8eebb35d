"""Random numbers tied to an image of the stream, not to a process: the same at any world size and after any resume.

They come from a counter-based generator (Philox; Salmon et al., "Parallel random numbers: as easy as 1, 2, 3") keyed by
the seed, with the position in the high word of its counter: every position has 2^192 numbers of its own.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What the numbers are for. With one seed, the numbers for two purposes are independent."""

    TRAINING = 0
    SAMPLING = 1
    LABELS = 2
    SLOTS = 3


@dataclass(frozen=True)
class Draws:
    """The random numbers of B images: noise (B, *shape) float32, standard normal; uniform (B, 3) float64 in [0, 1); and
    slot (B,) int64, rows of the sample embedding, drawn without replacement in each group so that no slot is special.

    Images drawn from a posterior also have its noise, `posterior`, shaped like `noise`; images that may be mirrored
    also have flip (B,) bool, true for half of them.
    """

    noise: np.ndarray
    uniform: np.ndarray
    slot: np.ndarray
    posterior: np.ndarray | None = None
    flip: np.ndarray | None = None


def draw(
    seed: int,
    purpose: Purpose,
    positions: np.ndarray,
    shape: tuple[int, ...],
    group_size: int,
    max_group_size: int,
    posterior: bool = False,
    mirrored: bool = False,
) -> Draws:
    """Return the numbers of the images at `positions` (B,) of a stream, in groups of `group_size`. Each depends only on
    the image's position, except for the slots, which depend on the position of the group's first image. With a
    `max_group_size` of 0, numbers are as with 1: all slots are 0."""
    rows = max(max_group_size, 1)
    noise = np.empty((1 + posterior, len(positions), *shape), np.float32)
    uniform = np.empty((len(positions), 3 + rows + mirrored))
    for i, rng in enumerate(generators(seed, purpose, positions)):
        rng.random(out=uniform[i])
        for part in noise:
            rng.standard_normal(out=part[i], dtype=np.float32)
    slot = _distinct_rows(uniform[::group_size, 3 : 3 + rows], group_size)
    drawn = Draws(noise[0], uniform[:, :3], slot)
    if posterior:
        drawn = replace(drawn, posterior=noise[1])
    return replace(drawn, flip=uniform[:, -1] < 0.5) if mirrored else drawn


def step_noise(seed: int, positions: np.ndarray, shape: tuple[int, ...], step: int) -> np.ndarray:
    """Return the standard normal noise (B, *shape) float32 that a sampler adds to the samples at `positions` in a
    step."""
    noise = np.empty((len(positions), *shape), np.float32)
    for out, rng in zip(noise, generators(seed, Purpose.SAMPLING, positions, 1 + step), strict=True):
        rng.standard_normal(out=out, dtype=np.float32)
    return noise


def group_labels(seed: int, groups: np.ndarray, num_classes: int) -> np.ndarray:
    """Return a class (b,) int64 of each group of samples with numbers `groups` (b,), uniform and independent."""
    return np.array([rng.integers(num_classes) for rng in generators(seed, Purpose.LABELS, groups)], np.int64)


def call_slots(seed: int, groups: np.ndarray, group_size: int, max_group_size: int, call: int) -> np.ndarray:
    """Return rows of the sample embedding (b * group_size,) int64, drawn without replacement in each of the groups of
    samples with numbers `groups` (b,), anew for each number of a network's `call`."""
    uniform = np.empty((len(groups), max_group_size))
    for out, rng in zip(uniform, generators(seed, Purpose.SLOTS, groups, call), strict=True):
        rng.random(out=out)
    return _distinct_rows(uniform, group_size)


def generators(seed: int, purpose: Purpose, positions: Iterable[int], part: int = 0) -> Iterator[np.random.Generator]:
    """Yield the generator of each position (counted from 0) in turn. A position has many parts of 2^128 numbers each.
    All are one object whose state is reset: building one for each image would cost more than drawing its numbers."""
    philox = np.random.Philox(key=np.array([seed, purpose], np.uint64), counter=0)
    rng, state = np.random.Generator(philox), philox.state
    for position in positions:
        state["state"]["counter"][2:] = part, position
        philox.state = state
        yield rng


def _distinct_rows(uniform: np.ndarray, group_size: int) -> np.ndarray:
    """Return the first `group_size` of a random order of rows for each group, given a number for each row."""
    return np.argsort(uniform, axis=1, kind="stable")[:, :group_size].ravel()
