import numpy as np
import pytest

from data.neighbors import nearest_neighbors

SEEDS = range(4)


def brute_force(features, k):
    """(ids, similarities) row by row in numpy float64; of equal similarities the lower id first."""
    features = np.asarray(features, dtype=np.float64)
    norm = [np.sqrt((row * row).sum()) for row in features]
    ids, similarities = [], []
    for i, row in enumerate(features):
        cosine = {}
        for j, other in enumerate(features):
            if j != i:
                cosine[j] = (row * other).sum() / (norm[i] * norm[j]) if norm[i] and norm[j] else 0.0
        nearest = sorted(cosine, key=lambda j: (-cosine[j], j))[:k]
        ids.append(nearest)
        similarities.append([cosine[j] for j in nearest])
    return np.array(ids), np.array(similarities)


def check(features, k, block):
    graph = nearest_neighbors(features, k, block)
    ids, similarities = brute_force(features, k)
    np.testing.assert_array_equal(graph.ids, ids)
    np.testing.assert_allclose(graph.similarities, similarities, rtol=0, atol=1e-6)
    assert graph.ids.dtype == np.int32
    assert graph.similarities.dtype == np.float32


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("block", [1, 7, 60, 1024])
def test_neighbors_of_scattered_images_are_those_of_brute_force(seed, block):
    rng = np.random.default_rng(seed)
    check(rng.normal(size=(60, 5)), 9, block)
    check(rng.normal(size=(61, 5)).astype(np.float32), 60, block)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("block", [1, 7, 60, 1024])
@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float32])
def test_neighbors_of_whole_numbers_are_those_of_brute_force_ties_by_lower_id(seed, block, dtype):
    """Few values in few dimensions: nearly all similarities are equal to some other."""
    rng = np.random.default_rng(seed)
    features = rng.integers(1, 4, size=(60, 2)).astype(dtype)
    check(features, 12, block)
    check(features, 59, block)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("block", [1, 7, 1024])
def test_copies_of_one_image_come_in_the_order_of_their_ids(seed, block):
    rng = np.random.default_rng(seed)
    kind = rng.integers(8, size=75)
    graph = nearest_neighbors(rng.integers(-5, 6, size=(8, 6))[kind] + 0.25, 74, block)
    for neighbors in graph.ids:
        for copies in (neighbors[kind[neighbors] == c] for c in range(8)):
            assert (np.diff(copies) > 0).all()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", ["scattered", "clustered", "tied"])
def test_an_image_is_never_its_own_neighbor_and_none_comes_twice(random_images, kind, seed):
    features = random_images(kind, 50, 3, seed).features
    graph = nearest_neighbors(features, 49)
    for i, neighbors in enumerate(graph.ids):
        assert sorted(neighbors) == [j for j in range(50) if j != i]


@pytest.mark.parametrize("seed", SEEDS)
def test_similarity_falls_along_the_list_and_ignores_length(random_images, seed):
    features = random_images("scattered", 40, 3, seed).features
    graph = nearest_neighbors(features, 20)
    assert (np.diff(graph.similarities, axis=1) <= 0).all()
    scaled = nearest_neighbors(features * np.random.default_rng(seed).uniform(0.01, 100, size=(40, 1)), 20)
    np.testing.assert_array_equal(scaled.ids, graph.ids)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("zeros", [1, 2, 5])
@pytest.mark.parametrize("block", [3, 1024])
def test_an_image_of_zeros_is_similar_to_none(seed, zeros, block):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(30, 4))
    empty = rng.choice(30, size=zeros, replace=False)
    features[empty] = 0
    graph = nearest_neighbors(features, 29, block)
    assert not graph.similarities[empty].any()
    check(features, 12, block)


@pytest.mark.parametrize("k", [-1, 0, 10, 11])
def test_a_number_of_neighbors_out_of_range_is_an_error_that_names_it(k):
    with pytest.raises(ValueError, match=rf"neighbors={k}.*\b9\b"):
        nearest_neighbors(np.ones((10, 2)), k)
    assert nearest_neighbors(np.ones((10, 2)), 9).ids.shape == (10, 9)
