"""Which images form a group: by similarity, by class, or at random. Vectorised; pure functions of a generator."""

import numpy as np

from data.neighbors.exact import NeighborGraph

BLOCK = 2**16  # images whose neighbours are examined at once
_NONE = np.uint32(2**32 - 1)


def similar_groups(
    graph: NeighborGraph, threshold: float, size: int, count: int, rng: np.random.Generator
) -> np.ndarray:
    """Return up to `count` disjoint groups (m, size) of an anchor and size - 1 of its neighbours at or above
    `threshold`.

    This is the paper's query (arXiv 2512.10954): members are drawn at random from the anchor's candidates. It proceeds
    in rounds of proposals: in each, some anchors draw members from the images still free, and a group is formed if no
    higher-ranked proposal wants any of its images. When few groups are needed, anchors are chosen at random. When most
    images must be in a group, images with the fewest ways into one (free neighbours, plus free images whose neighbour
    they are) go first, because they would otherwise be left over. It ends when no free image has enough free
    neighbours.
    """
    n = len(graph.ids)
    least = _at_or_above(threshold, graph.similarities.dtype)
    if size == 1:
        return rng.permutation(n)[:count, None].astype(np.int32)
    free = np.ones(n, dtype=bool)
    anchors = rng.permutation(n).astype(np.int32)
    found: list[np.ndarray] = []
    missing = count
    while missing and len(anchors):
        few = missing + missing // 4 + 16
        at_random = few < len(anchors) // 5
        pool, anchors = (anchors[:few], anchors[few:]) if at_random else (anchors, anchors[:0])
        pool = pool[free[pool]]
        choices, wanted = _choices(graph, pool, free, least, size - 1)
        enough = choices >= size - 1
        pool, choices = pool[enough], choices[enough]
        if at_random:
            chosen = pool
        else:
            ways = choices + wanted[pool]
            draw = rng.integers(2**32, size=len(pool), dtype=np.uint64)  # breaks ties
            order = np.argsort(ways.astype(np.uint64) << np.uint64(32) | draw, kind="stable")
            chosen = pool[order[: max(len(order) // 5, 64)]]
        members = _draw(graph.ids[chosen], _usable(graph, chosen, free, least), size - 1, rng)
        groups = np.concatenate([chosen[:, None], members], axis=1)
        groups = groups[_uncontested(groups, n)][:missing]
        free[groups] = False
        found.append(groups)
        missing -= len(groups)
        anchors = np.concatenate([anchors, pool])
    return np.concatenate(found) if found else np.empty((0, size), np.int32)


def _usable(graph: NeighborGraph, images: np.ndarray, free: np.ndarray, least: np.floating) -> np.ndarray:
    """Return which neighbours of these images are free and similar enough, (m, k) bool."""
    return free[graph.ids[images]] & (graph.similarities[images] >= least)


def _choices(
    graph: NeighborGraph, pool: np.ndarray, free: np.ndarray, least: np.floating, least_choices: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the number of usable neighbours of each image of the pool (m,), and, for each image of the set, the number
    of pool images with at least `least_choices` choices that it is a usable neighbour of (n,). Work in blocks: all at
    once, ImageNet would take a gigabyte."""
    choices = np.empty(len(pool), np.int64)
    wanted = np.zeros(len(free), np.int64)
    for start in range(0, len(pool), BLOCK):
        images = pool[start : start + BLOCK]
        usable = _usable(graph, images, free, least)
        choices[start : start + BLOCK] = usable.sum(axis=1)
        usable[choices[start : start + BLOCK] < least_choices] = False
        wanted += np.bincount(graph.ids[images][usable], minlength=len(free))
    return choices, wanted


def _at_or_above(value: float, dtype: np.dtype) -> np.floating:
    """Return the smallest number of a type that is not below `value`: numpy would compare with the nearest one."""
    nearest = dtype.type(value)
    return nearest if float(nearest) >= value else np.nextafter(nearest, dtype.type(np.inf))


def _draw(candidates: np.ndarray, usable: np.ndarray, number: int, rng: np.random.Generator) -> np.ndarray:
    """Draw `number` usable candidates from each row, all subsets equally likely.

    Each candidate gets a random key with its column in the low bits, so keys differ and any sort finds the same ones.
    """
    column_bits = np.uint32(2 ** int(candidates.shape[1] - 1).bit_length() - 1)
    keys = rng.integers(2**32, size=candidates.shape, dtype=np.uint32) & ~column_bits
    keys |= np.arange(candidates.shape[1], dtype=np.uint32)
    keys[~usable] = _NONE
    smallest = np.sort(np.partition(keys, number - 1, axis=1)[:, :number], axis=1)
    return np.take_along_axis(candidates, (smallest & column_bits).astype(np.intp), axis=1)


def _uncontested(groups: np.ndarray, n: int) -> np.ndarray:
    """Return which rows hold only images that no earlier row wants, (m,) bool."""
    rank = np.arange(len(groups) - 1, -1, -1)
    owner = np.empty(n, np.int64)
    owner[groups[::-1].ravel()] = np.repeat(rank, groups.shape[1])  # the earliest row is written last
    return (owner[groups] == rank[::-1, None]).all(axis=1)


def class_groups(label: np.ndarray, pool: np.ndarray, size: int, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """Cut `pool` into groups (m, size) at random: first groups of one class, then groups of what is left of the
    classes.

    Return the groups and how many are of one class. Fewer than `size` images of the pool are left out.
    """
    pool = rng.permutation(pool)
    pool = pool[np.argsort(label[pool], kind="stable")]
    _, first, number = np.unique(label[pool], return_index=True, return_counts=True)
    in_class = np.arange(len(pool)) - np.repeat(first, number)
    whole = in_class < np.repeat(number // size * size, number)
    of_one_class = pool[whole].reshape(-1, size)
    rest = rng.permutation(pool[~whole])
    mixed = rest[: len(rest) // size * size].reshape(-1, size)
    return np.concatenate([rng.permutation(of_one_class), mixed]), len(of_one_class)
