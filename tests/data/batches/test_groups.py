from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from data.batches.groups import class_groups, similar_groups
from data.neighbors.exact import NeighborGraph

SEEDS = st.integers(0, 2**32)
KINDS = st.sampled_from(["scattered", "clustered", "tied"])


def even(counts):
    """Whether numbers drawn into equally likely boxes could be these."""
    return chisquare(counts).pvalue > 1e-4


def candidates(graph, image, threshold):
    return graph.ids[image][graph.similarities[image] >= np.float32(threshold)]


@given(
    KINDS, st.integers(20, 300), SEEDS, st.integers(2, 16), st.sampled_from([-1, 0, 0.3, 0.7, 0.95]), st.floats(0, 1)
)
@settings(max_examples=120, deadline=None)
def test_similar_groups_are_disjoint_and_of_an_anchor_and_its_candidates(
    graph_of, kind, number, seed, size, threshold, part
):
    images, graph = graph_of(kind, number, 19, seed)
    count = int(part * (number // size))
    groups = similar_groups(graph, threshold, size, count, np.random.default_rng(seed))
    assert groups.shape[0] <= count
    assert groups.shape[1] == size
    assert len(np.unique(groups)) == groups.size
    unit = images.features / np.linalg.norm(images.features, axis=1, keepdims=True)
    for anchor, *members in groups:
        assert set(members) <= set(candidates(graph, anchor, threshold))
        assert (unit[members] @ unit[anchor] >= threshold - 1e-6).all()
    if len(groups) < count:  # no further group could be made
        free = np.setdiff1d(np.arange(number), groups)
        assert all(np.isin(candidates(graph, i, threshold), free).sum() < size - 1 for i in free)


@given(KINDS, SEEDS, st.integers(2, 8), st.integers(1, 20))
@settings(max_examples=30, deadline=None)
def test_similar_groups_depend_on_the_generator_alone(graph_of, kind, seed, size, count):
    _, graph = graph_of(kind, 150, 12, seed)
    groups = [similar_groups(graph, 0.0, size, count, np.random.default_rng(s)) for s in (seed, seed, seed + 1)]
    np.testing.assert_array_equal(groups[0], groups[1])
    assert groups[0].shape != groups[2].shape or (groups[0] != groups[2]).any()


@pytest.mark.parametrize("number", [12, 200])  # in the small set all images propose, in the large one some at random
@pytest.mark.parametrize("size", [2, 3, 4, 7])
def test_members_are_any_of_the_anchors_candidates_with_equal_chance(graph_of, number, size):
    """Over many seeds, by place in the anchor's list of 6 candidates: every subset of size - 1 is equally likely."""
    _, graph = graph_of("scattered", number, 6, seed=number)
    subsets = {places: 0 for places in combinations(range(6), size - 1)}
    for seed in range(100 * len(subsets)):
        ((anchor, *members),) = similar_groups(graph, -1, size, 1, np.random.default_rng(seed))
        subsets[tuple(sorted(graph.ids[anchor].tolist().index(member) for member in members))] += 1
    assert len(subsets) == 1 or even(list(subsets.values()))


@pytest.mark.parametrize("count", [4, 40])
def test_members_stay_equally_likely_when_groups_compete(count):
    """40 clusters of 6 images, all alike: by symmetry each of an anchor's five candidates is a member equally often."""
    number = 240
    others = [[j for j in range(i // 6 * 6, i // 6 * 6 + 6) if j != i] for i in range(number)]
    graph = NeighborGraph(np.array(others, np.int32), np.ones((number, 5), np.float32))
    places = np.zeros(5)
    for seed in range(400):
        for anchor, *members in similar_groups(graph, 0.7, 3, count, np.random.default_rng(seed)):
            places += np.isin(graph.ids[anchor], members)
    # two of five are drawn without replacement: counts vary by 3/4 of a multinomial's variance
    expected = places.mean()
    assert ((places - expected) ** 2 / expected).sum() / 0.75 < 23.5  # chi-square of 4 degrees of freedom, p = 1e-4


@pytest.mark.parametrize("count", [1, 4, 16])
def test_anchors_come_at_random_when_few_groups_are_asked_for(count):
    """Half of 400 images have 3 candidates, half have 12: both kinds are anchors equally often."""
    number = 400
    rich = np.arange(number) % 2 == 1
    ids = (np.arange(number)[:, None] + np.arange(1, 13) * 13) % number
    similarities = np.where(rich[:, None] | (np.arange(12) < 3), 0.9, 0.1).astype(np.float32)
    graph = NeighborGraph(ids.astype(np.int32), similarities)
    anchors = np.concatenate(
        [similar_groups(graph, 0.7, 2, count, np.random.default_rng(seed))[:, 0] for seed in range(1600 // count)]
    )
    assert even(np.bincount(rich[anchors], minlength=2))


@pytest.mark.parametrize("number", [5, 200])
def test_a_group_of_one_is_any_image(number):
    graph = NeighborGraph(np.zeros((number, 1), np.int32), np.zeros((number, 1), np.float32))
    counts = np.zeros(number)
    for seed in range(20 * number):
        groups = similar_groups(graph, 0.7, 1, 3, np.random.default_rng(seed))
        assert groups.shape == (3, 1)
        counts[groups[:, 0]] += 1
    assert counts.sum() == 60 * number
    assert ((counts - 60) ** 2 / 60).sum() < number + 5 * (2 * number) ** 0.5


@given(st.integers(1, 200), st.integers(1, 8), st.integers(1, 16), SEEDS)
@settings(max_examples=150, deadline=None)
def test_class_groups_use_every_image_once_and_as_many_classes_whole_as_there_are(number, classes, size, seed):
    rng = np.random.default_rng(seed)
    label = rng.integers(classes, size=number) ** 2 % classes
    pool = rng.choice(number, size=rng.integers(1, number + 1), replace=False).astype(np.int32)
    groups, of_one_class = class_groups(label, pool, size, rng)
    assert groups.shape == (len(pool) // size, size)
    assert len(np.unique(groups)) == groups.size
    assert np.isin(groups, pool).all()
    assert of_one_class == sum(n // size for n in np.bincount(label[pool]))
    assert (label[groups[:of_one_class]] == label[groups[:of_one_class, :1]]).all()


@pytest.mark.parametrize("size", [2, 3])
def test_any_images_of_a_class_are_a_group_with_equal_chance(size):
    label = np.array([0, 1, 0, 0, 1, 1, 0, 1, 1, 0, 0, 1])  # six of each class
    subsets = {}
    for seed in range(1500):
        groups, of_one_class = class_groups(label, np.arange(12), size, np.random.default_rng(seed))
        assert of_one_class == len(groups) == 12 // size
        for group in groups:
            key = tuple(sorted(group.tolist()))
            subsets[key] = subsets.get(key, 0) + 1
    assert len(subsets) == 2 * len(list(combinations(range(6), size)))
    counts = np.array(list(subsets.values()))
    assert abs(counts - counts.mean()).max() < 5 * counts.mean() ** 0.5


def test_what_classes_leave_over_is_mixed_and_left_out_at_random():
    """Six classes of three images: in groups of two, one image of each class is over; in groups of four, all are."""
    label = np.arange(18) // 3
    partner, left_out = np.zeros((6, 6)), np.zeros(6)
    for seed in range(600):
        groups, of_one_class = class_groups(label, np.arange(18), 2, np.random.default_rng(seed))
        for a, b in label[groups[of_one_class:]]:
            partner[[a, b], [b, a]] += 1
        groups, _ = class_groups(label, np.arange(18), 4, np.random.default_rng(seed))
        left_out += np.bincount(label[np.setdiff1d(np.arange(18), groups)], minlength=6)
    assert even(left_out)
    assert even(partner[np.triu_indices(6, 1)])
