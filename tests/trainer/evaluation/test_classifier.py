import numpy as np
import pytest
from scipy.linalg import sqrtm

from data.sets.registry import DataConfig, open_images
from trainer.errors import RunError
from trainer.evaluation.classifier import make_evaluator
from trainer.evaluation.frechet import frechet_distance


@pytest.mark.parametrize("seed", range(5))
def test_frechet_distance_equals_scipys_square_root(seed):
    rng = np.random.default_rng(seed)
    d = int(rng.integers(2, 20))
    a = rng.standard_normal((200, d)) @ rng.standard_normal((d, d)) + rng.standard_normal(d)
    b = rng.standard_normal((150, d)) @ rng.standard_normal((d, d))
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-8)


def test_frechet_distance_of_gaussians_with_known_moments():
    """N(0, 1) and N(m, s^2) in each of d independent dimensions: d (m^2 + (s - 1)^2)."""
    a = np.random.default_rng(0).standard_normal((100_000, 3))
    assert frechet_distance(a, 2 * a + 5) == pytest.approx(3 * (25 + 1), rel=0.01)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-8)


def test_frechet_distance_of_features_that_never_vary_is_finite():
    a = np.random.default_rng(0).standard_normal((5, 20))
    a[:, 3] = 0
    assert 0 <= frechet_distance(a, a[:, ::-1]) < np.inf


@pytest.fixture(scope="module")
def splits():
    return open_images(DataConfig()), open_images(DataConfig(), "heldout")


def as_uint8(x):
    return np.rint((x + 1) * 127.5).astype(np.uint8).transpose(0, 2, 3, 1)


@pytest.fixture(scope="module")
def evaluate(splits):
    return make_evaluator(*splits)


def test_real_digits_are_near_and_noise_and_wrong_classes_are_not(splits, evaluate):
    train, heldout = splits
    real = evaluate(as_uint8(train.x), train.label)
    assert real["frechet"] == pytest.approx(real["frechet_train"], rel=1e-6)
    assert real["class_accuracy"] > 0.99 and real["heldout_accuracy"] > 0.94
    assert real["precision"] > 0.8 and real["recall"] > 0.8
    itself = evaluate(as_uint8(heldout.x), heldout.label)
    assert itself["frechet"] == pytest.approx(0, abs=1e-6) and (itself["precision"], itself["recall"]) == (1, 1)

    wrong = evaluate(as_uint8(train.x), (train.label + 1) % 10)
    assert wrong["class_accuracy"] < 0.01
    noise = np.random.default_rng(0).integers(0, 256, (500, 8, 8, 1), dtype=np.uint8)
    noisy = evaluate(noise, np.zeros(500))
    assert noisy["frechet"] > 10 * real["frechet"] and noisy["kid"] > 10 * abs(real["kid"]) and noisy["precision"] < 0.1
    one_class = train.label == 3
    narrow = evaluate(as_uint8(train.x[one_class]), train.label[one_class])
    assert narrow["frechet"] > 10 * real["frechet"] and narrow["precision"] > 0.8 and narrow["recall"] < 0.3


@pytest.mark.parametrize("shape", [(9, 8, 8, 3), (9, 1, 8, 8), (3, 8, 8, 1), (9, 8, 8)])
def test_images_of_another_form_are_refused(evaluate, shape):
    with pytest.raises(RunError, match=r"images uint8 .*: give uint8 \(n, 8, 8, 1\), n > 3"):
        evaluate(np.zeros(shape, np.uint8), np.zeros(shape[0]))
    with pytest.raises(RunError, match="images float32 "):
        evaluate(np.zeros((9, 8, 8, 1), np.float32), np.zeros(9))
