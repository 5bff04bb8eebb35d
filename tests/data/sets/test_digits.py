import numpy as np
import pytest
import sklearn.datasets

from data.sets import digits
from data.sets.arrays import ArrayImages
from data.sets.registry import DataConfig, open_images

SPLITS = ("train", "heldout")


def rows(x, label):
    """(pixels 0..16, label) of each image, in an order of their own."""
    table = np.concatenate([np.asarray(x).reshape(len(x), -1), np.asarray(label)[:, None]], axis=1)
    return table[np.lexsort(table.T)]


def test_the_splits_hold_every_digit_once():
    """As often as scikit-learn has it: so no image is in both."""
    pixels, label = sklearn.datasets.load_digits(return_X_y=True)
    assert len(pixels) == 1797
    parts = [digits.load(split) for split in SPLITS]
    x, labels = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
    np.testing.assert_array_equal(rows((x + 1) * 8, labels), rows(pixels, label))


@pytest.mark.parametrize("split", SPLITS)
def test_both_splits_hold_every_class_in_about_equal_parts(split):
    _, label, _, classes = digits.load(split)
    counts = np.bincount(label, minlength=classes)
    assert classes == len(counts) == 10
    assert counts.min() > 0.7 * counts.max()


@pytest.mark.parametrize("split", SPLITS)
def test_images_fill_the_range_from_minus_1_to_1(split):
    x, label, features, _ = digits.load(split)
    assert x.shape == (len(label), 1, 8, 8)
    assert (x.min(), x.max()) == (-1, 1)
    assert x.dtype == np.float32
    assert label.dtype == np.int64
    np.testing.assert_array_equal((x.reshape(-1, 64) + 1) * 8, features)


@pytest.mark.parametrize("split", SPLITS)
def test_features_are_whole_numbers_so_that_every_machine_finds_the_same_neighbors(split):
    features = digits.load(split)[2]
    assert (features == features.round()).all()
    assert (features.min(), features.max()) == (0, 16)


def test_a_third_is_held_out_and_loading_twice_gives_the_same():
    sizes = [len(digits.load(split)[1]) for split in SPLITS]
    assert sizes == [1198, 599]
    for a, b in zip(digits.load("train"), digits.load("train"), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("split", SPLITS)
def test_images_by_name_are_those_of_the_split(split):
    images = open_images(DataConfig(), split)
    x, label, features, classes = digits.load(split)
    assert isinstance(images, ArrayImages)
    assert len(images) == len(label)
    assert images.num_classes == classes
    for ours, theirs in ((images.x, x), (images.label, label), (images.features, features)):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(open_images(DataConfig()).label, digits.load("train")[1])
