"""Each measure against another way to compute it, streaming against one piece, and on real ranks."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist

from trainer.errors import RunError
from trainer.evaluation.accumulators import Moments
from trainer.evaluation.frechet import frechet, frechet_distance, warn_if_few
from trainer.evaluation.inception_score import InceptionScore
from trainer.evaluation.kernel_distance import kernel_distance
from trainer.evaluation.precision_recall import precision, recall

CPU = torch.device("cpu")


def streamed(features, cuts):
    """Moments of features (n, d), added in the pieces between `cuts`."""
    moments = Moments(features.shape[1], CPU)
    for piece in np.split(features, cuts):
        moments.add(torch.from_numpy(piece))
    return moments.value()


@pytest.mark.parametrize("seed", range(5))
def test_moments_added_in_parts_are_those_of_the_whole_and_so_is_the_distance(seed):
    rng = np.random.default_rng(seed)
    a, b = (rng.standard_normal((n, 17)) @ rng.standard_normal((17, 17)) + 10 * rng.random(17) for n in (203, 150))
    parts = [streamed(x, np.sort(rng.integers(0, len(x), 6))) for x in (a, b)]
    for (mean, covariance), x in zip(parts, (a, b), strict=True):
        np.testing.assert_allclose(mean, x.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(covariance, np.cov(x, rowvar=False), rtol=1e-9, atol=1e-9)
    assert frechet(*parts[0], *parts[1]) == pytest.approx(frechet_distance(a, b), rel=1e-6)
    product = np.cov(a, rowvar=False) @ np.cov(b, rowvar=False)
    expected = np.square(a.mean(0) - b.mean(0)).sum() + a.var(0, ddof=1).sum() + b.var(0, ddof=1).sum()
    assert frechet(*parts[0], *parts[1]) == pytest.approx(expected - 2 * np.trace(sqrtm(product).real), rel=1e-8)


def test_distance_of_gaussians_in_closed_form():
    """Covariances with common axes: sum over them of (mean difference)^2 + (difference of standard deviations)^2."""
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.standard_normal((30, 30)))[0]
    mean_a, mean_b, std_a, std_b = rng.random((4, 30))
    found = frechet(mean_a, axes * std_a**2 @ axes.T, mean_b, axes * std_b**2 @ axes.T)
    assert found == pytest.approx(np.square(mean_a - mean_b).sum() + np.square(std_a - std_b).sum(), rel=1e-10)


@pytest.mark.parametrize("number", [2, 5, 40, 400])
def test_the_distance_of_a_set_to_itself_is_0_whatever_the_rank(number):
    features = np.random.default_rng(number).standard_normal((number, 64)) * np.logspace(-4, 2, 64)
    features[:, :3] = 7
    mean, covariance = streamed(features, [number // 2])
    assert frechet(mean, covariance, mean, covariance) == pytest.approx(0, abs=1e-9)
    other = streamed(features[::-1] + 0.5, [])
    assert frechet(mean, covariance, *other) == pytest.approx(64 * 0.25, rel=1e-6), "a shift"


def test_covariances_without_full_rank_give_the_distance_of_the_subspaces():
    """Two sets in the same plane of 50 dimensions: as the distance in the plane, where both have full rank."""
    rng = np.random.default_rng(1)
    plane = np.linalg.qr(rng.standard_normal((50, 2)))[0]
    a, b = rng.standard_normal((30, 2)), 3 * rng.standard_normal((40, 2)) + 1
    assert frechet_distance(a @ plane.T, b @ plane.T) == pytest.approx(frechet_distance(a, b), rel=1e-9)


def test_fewer_images_than_features_are_warned_of():
    with pytest.warns(UserWarning, match="64 images for 64 features: their covariance is rank-deficient"):
        warn_if_few(64, 64)
    warn_if_few(65, 64)


@pytest.mark.parametrize("number", [0, 1])
def test_a_covariance_of_less_than_two_images_is_an_error(number):
    with pytest.raises(RunError, match=f"^{number} images: a covariance needs at least 2; give more$"):
        streamed(np.ones((number, 4)), [])


def inception_score(probabilities, splits=10):
    """As in the code of Salimans et al. and of NVlabs, of images shuffled as in torch-fidelity's."""
    found = []
    probabilities = probabilities[np.random.RandomState(2020).permutation(len(probabilities))]
    for part in np.array_split(probabilities, [i * len(probabilities) // splits for i in range(1, splits)]):
        divergence = part * (np.log(part) - np.log(part.mean(axis=0)))
        found.append(np.exp(divergence.sum(axis=1).mean()))
    return np.mean(found)


@pytest.mark.parametrize("seed", range(4))
def test_inception_score_in_parts_and_in_any_order_equals_the_plain_computation(seed):
    rng = np.random.default_rng(seed)
    number, classes = int(rng.integers(10, 300)), int(rng.integers(2, 30))
    p = rng.dirichlet(np.full(classes, 0.3), number) + 1e-9
    p /= p.sum(axis=1, keepdims=True)
    statistic = InceptionScore(classes, number, CPU)
    for piece in np.array_split(rng.permutation(number), 7):
        statistic.add(torch.from_numpy(p[piece]), torch.from_numpy(piece))
    assert statistic.value() == pytest.approx((inception_score(p),), rel=1e-9)


def random_probabilities(number, classes, seed):
    """Of images that come class by class, each most probably of its class."""
    p = np.random.default_rng(seed).dirichlet(np.full(classes, 0.02), number)
    return 0.1 * p + 0.9 * np.eye(classes)[np.arange(number) * classes // number]


def scored(p, order, pieces=1):
    """The score of images of p as files in this order, added in so many pieces that arrive in any order."""
    statistic = InceptionScore(p.shape[1], len(order), CPU)
    for piece in np.random.default_rng(pieces).permutation(pieces):
        numbers = np.array_split(np.arange(len(order)), pieces)[piece]
        statistic.add(torch.from_numpy(p[order[numbers]]), torch.from_numpy(numbers))
    return float(statistic.value()[0])


def test_inception_score_hardly_depends_on_the_order_of_the_files():
    """Of consecutive parts, as before, that of images in order of their classes would be a tenth of that of shuffled
    ones: each part would have 5 of 50 classes."""
    p = random_probabilities(5000, 50, seed=0)
    rng = np.random.default_rng(1)
    shuffled = [scored(p, rng.permutation(5000)) for _ in range(5)]
    groups = scored(p, np.arange(5000).reshape(50, 10, 10).swapaxes(0, 1).reshape(5000))  # groups of 10 of each in turn
    for found in (scored(p, np.arange(5000)), groups):
        assert found == pytest.approx(np.mean(shuffled), rel=0.01)
    assert np.ptp(shuffled) < 0.02 * np.mean(shuffled) and np.mean(shuffled) > 30


def test_inception_score_is_the_same_bit_for_bit_however_its_images_arrive():
    p = random_probabilities(1237, 30, seed=2)
    assert len({scored(p, np.arange(1237), pieces) for pieces in (1, 2, 3, 7, 40, 1237)}) == 1


def test_inception_score_of_sure_and_of_unsure_probabilities():
    """As many as there are classes, of sure predictions of all classes; 1 where all are the same. No NaN from zeros."""
    for p, expected in (
        (torch.eye(8).repeat(20, 1), 8),
        (torch.eye(8)[:1].repeat(160, 1), 1),
        (torch.ones(160, 8) / 8, 1),
    ):
        statistic = InceptionScore(8, 160, CPU, splits=1)
        statistic.add(p, torch.arange(160))
        assert statistic.value() == pytest.approx((expected,), rel=1e-12)


def test_kernel_distance_of_whole_sets_is_the_unbiased_estimate():
    """Sums over all pairs of different ones (Gretton et al. 2012, eq. 3), one by one."""
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((9, 5)), rng.standard_normal((9, 5)) + 1

    def kernel(x, y):
        return (float(x @ y) / 5 + 1) ** 3

    within = sum(kernel(s[i], s[j]) for s in (a, b) for i in range(9) for j in range(9) if i != j) / 72
    across = sum(kernel(x, y) for x in a for y in b) / 81
    assert kernel_distance(a, b, subsets=3) == pytest.approx(within - 2 * across, rel=1e-12)


def test_kernel_distance_has_the_expectation_of_the_true_one():
    """d = 1, x ~ N(0, 1), y = m: E k(x,x') = E (xx'+1)^3 = 1 + 3 E(xx')^2 = 4, k(y,y) = (m^2+1)^3, and
    E k(x,y) = 1 + 3 m^2."""
    rng = np.random.default_rng(3)
    x, m = rng.standard_normal((20_000, 1)), 0.7
    found = kernel_distance(x, np.full((20_000, 1), m), subsets=40)
    assert found == pytest.approx(4 + (m**2 + 1) ** 3 - 2 * (1 + 3 * m**2), abs=0.15)
    assert kernel_distance(x[:10_000], x[10_000:], subsets=40) == pytest.approx(0, abs=0.1), "unbiased: not above 0"
    assert kernel_distance(x, x + 1, 5) == kernel_distance(x, x + 1, 5), "the same subsets each time"


def precision_and_recall(generated, reference, k=3):
    return precision(generated, reference, k), recall(generated, reference, k)


def neighbours(generated, reference, k):
    """As the paper defines it (eq. 1), by sorting all distances."""

    def inside(points, manifold):
        radius = np.sort(cdist(manifold, manifold), axis=1)[:, k]
        return float(np.mean((cdist(points, manifold) <= radius).any(axis=1)))

    return inside(generated, reference), inside(reference, generated)


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("seed", range(4))
def test_precision_and_recall_equal_brute_force(monkeypatch, seed, k):
    rng = np.random.default_rng(seed)
    monkeypatch.setattr("trainer.evaluation.precision_recall.ROWS", int(rng.integers(1, 40)))
    monkeypatch.setattr("trainer.evaluation.precision_recall.COLUMNS", int(rng.integers(1, 90)))
    a = rng.standard_normal((int(rng.integers(k + 1, 150)), 6)).astype(np.float32)
    b = 1.3 * rng.standard_normal((int(rng.integers(k + 1, 150)), 6)).astype(np.float32) + 0.4
    assert precision_and_recall(a, b, k) == pytest.approx(neighbours(a, b, k), abs=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.integers(4, 60), st.integers(4, 60), st.integers(0, 2**32 - 1))
def test_precision_of_one_set_is_recall_of_the_other(n, m, seed):
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((n, 3)), rng.standard_normal((m, 3)) + 0.5
    assert precision_and_recall(a, b) == precision_and_recall(b, a)[::-1]
    assert precision_and_recall(a, a) == (1, 1)
    assert precision_and_recall(a, a + 1000) == (0, 0)


def test_fewer_modes_keep_the_precision_and_lose_the_recall():
    rng = np.random.default_rng(4)
    real = np.concatenate([rng.standard_normal((300, 2)), rng.standard_normal((300, 2)) + 20])
    found = precision_and_recall(rng.standard_normal((600, 2)), real)
    assert found[0] > 0.9 and 0.4 < found[1] < 0.55
