import numpy as np
import pytest
import torch

import data.neighbors.exact
from data.neighbors.exact import ExactSearch, nearest_neighbors

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


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def by_sorting(features, k):
    """What `brute_force` finds, in one product: exact for whole numbers and for float16 of length about 1, so that its
    order of summation does not matter."""
    rows = np.asarray(features, dtype=np.float64)
    norm = np.sqrt((rows * rows).sum(axis=1))
    norm[norm == 0] = 1
    cosine = rows @ rows.T / (norm[:, None] * norm)
    np.fill_diagonal(cosine, -np.inf)
    ids = np.argsort(-cosine, axis=1, kind="stable")[:, :k]
    return ids, np.take_along_axis(cosine, ids, axis=1)


def some_features(kind, rng, number=300):
    return {
        "scattered": lambda: rng.normal(size=(number, 7)),
        "units": lambda: unit(rng.normal(size=(number, 24))),
        "copies": lambda: unit(rng.normal(size=(9, 24)))[rng.integers(9, size=number)],
        "few values": lambda: rng.integers(0, 3, size=(number, 3)).astype(np.uint8),
        "zero rows": lambda: unit(rng.normal(size=(number, 6))) * rng.integers(2, size=(number, 1), dtype=np.uint8),
        "dense cluster": lambda: unit(1 + 0.01 * rng.normal(size=(number, 12))),
        "denser than float32": lambda: 10_000 + rng.integers(-3, 4, size=(number, 4)),
        "dense, of float16": lambda: unit(1 + 2e-4 * rng.normal(size=(number, 16))),
        "all zeros": lambda: np.zeros((number, 4), np.float16),
        "one opposite": lambda: unit(np.where(np.arange(number)[:, None] == 3, -1.0, 1) * np.ones((1, 4))),
    }[kind]()


KINDS = ["scattered", "units", "copies", "few values", "zero rows", "dense cluster"]
KINDS += ["denser than float32", "dense, of float16", "all zeros", "one opposite"]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_whatever_the_first_look_misses_the_answer_is_that_of_float64_in_any_blocks(kind, precision, seed, monkeypatch):
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    features = some_features(kind, rng)
    number = len(features)
    for columns, elements, k in ((2**17, 2**18, 20), (7, 1, 3), (37, 5000, 20), (299, 1, 1), (64, 100, number - 1)):
        monkeypatch.setattr(data.neighbors.exact, "COLUMNS", columns)
        monkeypatch.setattr(data.neighbors.exact, "EXACT_ELEMENTS", elements)
        asked = np.arange(number) if elements > 1000 else rng.permutation(number)[:40]
        ids, similarities = ExactSearch(features, "cpu", precision).nearest(asked, k)
        expected, cosine = by_sorting(features, k)
        np.testing.assert_array_equal(ids, expected[asked])
        np.testing.assert_allclose(similarities, cosine[asked], rtol=0, atol=1e-15)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_last_resort_is_taken_where_float32_cannot_prove_the_answer_and_only_there(precision, monkeypatch):
    taken, sort_all = [], ExactSearch._sort_all

    def counted(self, images, k):
        taken.append(len(images))
        return sort_all(self, images, k)

    monkeypatch.setattr(ExactSearch, "_sort_all", counted)
    for kind, expected in (("units", 0), ("dense cluster", 0), ("denser than float32", 300), ("all zeros", 300)):
        features = some_features(kind, np.random.default_rng(1))
        ExactSearch(features, "cpu", precision).nearest(np.arange(300), 20)
        assert sum(taken) == expected, kind
        taken.clear()


def rounded_products(query, rows):
    """The first look's products of one image with others, by bf16."""
    query, rows = (torch.from_numpy(array).double() for array in (query, rows))
    query, rows = ((a / a.norm(dim=1, keepdim=True)).float().bfloat16() for a in (query, rows))
    return (query @ rows.T).double().numpy()[0]


@pytest.mark.parametrize("seed", SEEDS)
def test_rounding_to_bf16_at_its_worst_hides_no_neighbor(seed):
    """The query's numbers, and those of its nearest, all lie where bf16 rounds down by nearly its most, 2**-8 of them.
    So their product comes out far too small: as that of many images which are truly less alike, and which hide it. One
    more, of which bf16 thinks better, pretends that the proof holds."""
    rng = np.random.default_rng(seed)
    query = np.array([0.5] * 3 + [0.25] * 3 + [0.125] * 3) * (1 + 2**-8) * 0.9995
    query = np.append(query, np.sqrt(1 - (query**2).sum()))
    permuted = rng.permuted(np.tile(query, (3000, 1)), axis=1)
    others = unit(np.concatenate([permuted, query + 0.25 * rng.normal(size=(100_000, 10))]))
    query = unit(query[None])
    found = rounded_products(query, others)
    rows = others.astype(np.float64)
    true = (rows @ query[0].astype(np.float64)) / np.linalg.norm(rows, axis=1) / np.linalg.norm(query.astype(float))
    nine_bits = 3.1 * 2**-9  # the error that a type of one bit more would make
    traps = 0
    for value in np.unique(found[(found >= 0.5) & (found < 0.97)]):
        same = np.flatnonzero(found == value)
        nearest, hiding = same[true[same].argmax()], same[true[same] < value + nine_bits][:2000]
        bait = np.flatnonzero((found > value) & (true > value + nine_bits) & (true < true[nearest]))
        if len(bait) and len(hiding) > 400 and traps < 4:
            traps += 1
            for place in (0, len(hiding) // 2, len(hiding)):
                rows = np.concatenate([query, others[bait[:1]], others[np.insert(hiding, place, nearest)]])
                assert ExactSearch(rows, "cpu", "bf16").nearest(np.arange(1), 1)[0].item() == 2 + place
    assert traps
