"""As many samples of each class at any group size; or classes drawn for groups."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.sampling.generation import SampleConfig
from trainer.errors import RunError
from trainer.sampling.labels import check_per_class, deal_classes


def dealt(number, num_classes, size, **settings):
    sample = SampleConfig(cond_group_size=1, uncond_group_size=size, **settings)
    return deal_classes(sample, number, num_classes)


@pytest.mark.parametrize(("number", "num_classes", "each"), [(50_000, 1000, 50), (60, 10, 6), (10_000, 1000, 10)])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 8, 16, 64])
def test_of_each_class_there_are_as_many_at_any_group_size(number, num_classes, each, size):
    classes, kept = dealt(number, num_classes, size)
    assert (np.bincount(classes.repeat(kept), minlength=num_classes) == each).all()
    assert len(classes) == num_classes * -(-each // size), "no group more than that takes"


@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 20))
def test_classes_are_in_turn_and_only_the_last_group_of_each_is_cut(number, num_classes, size):
    classes, kept = dealt(number, num_classes, size)
    assert (classes == np.arange(len(classes)) % num_classes).all()
    counts = np.bincount(classes.repeat(kept), minlength=num_classes)
    assert counts.sum() == kept.sum() == number and counts.max() - counts.min() <= 1
    for own in (kept[classes == number] for number in range(num_classes)):
        assert (own[:-1] == size).all() and (own > 0).all()


@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_random_classes_depend_on_seed_and_group_alone(number, num_classes, size, seed):
    """By the generator's own definition; the word `group` of its counter is the highest."""
    classes, kept = dealt(number, num_classes, size, labels="random", seed=seed)
    more, _ = dealt(number + 100, num_classes, size, labels="random", seed=seed)
    assert (more[: len(classes)] == classes).all()
    assert (kept[:-1] == size).all() and kept.sum() == number and 0 < kept[-1] <= size
    for group in {0, len(classes) // 2, len(classes) - 1}:
        philox = np.random.Philox(key=np.array([seed, 2], np.uint64), counter=np.array([0, 0, 0, group], np.uint64))
        assert classes[group] == np.random.Generator(philox).integers(num_classes)


def test_random_classes_are_uniform_and_independent():
    """By chi-square, of single classes and of pairs of neighbours: within 5 standard deviations."""
    classes, _ = dealt(200_000, 10, 4, labels="random", seed=3)
    pairs = 10 * classes[::2] + classes[1::2]
    for drawn, cells in ((classes, 10), (pairs, 100)):
        expected = len(drawn) / cells
        chi_square = ((np.bincount(drawn, minlength=cells) - expected) ** 2 / expected).sum()
        assert abs(chi_square - (cells - 1)) < 5 * (2 * (cells - 1)) ** 0.5
    assert (classes != dealt(200_000, 10, 4, labels="random", seed=4)[0]).mean() > 0.85


def test_random_classes_with_as_many_of_each_are_one_line():
    with pytest.raises(RunError) as raised:
        check_per_class(SampleConfig(labels="random", per_class=5))
    assert str(raised.value).startswith("sample.labels=random: sample.per_class=5") and "\n" not in str(raised.value)
    check_per_class(SampleConfig(per_class=5))
