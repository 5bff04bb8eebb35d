"""Measures of samples that were generated in groups: which ones they are, and formulas in closed form."""

import json

import numpy as np
import pytest
import torch

from models.sampling.generation import SampleConfig
from trainer.evaluation.accumulators import FEATURES, MOMENTS
from trainer.evaluation.frechet import frechet_distance
from trainer.evaluation.group_correlation import group_correlation
from trainer.evaluation.groups import GROUPS, Groups, make_groups, read_groups
from trainer.evaluation.image_sets import open_image_set
from trainer.evaluation.metrics import METRICS
from trainer.sampling.labels import deal_classes

CPU = torch.device("cpu")


def classes_of(classes, groups, size, in_turn=False):
    """The labels of groups of `size`, class by class or in turn."""
    turns = np.tile(np.arange(classes), groups) if in_turn else np.repeat(np.arange(classes), groups)
    return turns.repeat(size)


@pytest.mark.parametrize("in_turn", [False, True])
def test_groups_are_runs_of_a_class_cut_into_pieces(in_turn):
    label = classes_of(3, 4, 5, in_turn)
    groups = make_groups(label, 5)
    assert groups.group.tolist() == np.repeat(np.arange(12), 5).tolist() and groups.label is label


def test_the_last_group_of_a_class_may_be_cut():
    """50 of each class in groups of 16: 16, 16, 16 and 2."""
    groups = make_groups(np.arange(4).repeat(50), 16)
    assert np.bincount(groups.group).tolist() == [16, 16, 16, 2] * 4
    assert all(len(set(groups.label[groups.group == one])) == 1 for one in range(16))


@pytest.mark.parametrize("labels", ["balanced", "random"])
@pytest.mark.parametrize("seed", range(4))
def test_groups_of_any_number_of_samples_are_those_that_were_dealt(labels, seed):
    """As many samples, classes and images a group as there may be: also where the last groups of classes are cut."""
    rng = np.random.default_rng(seed)
    size = int(rng.integers(2, 9))
    sample = SampleConfig(cond_group_size=1, uncond_group_size=size, labels=labels, seed=seed)
    classes, kept = deal_classes(sample, int(rng.integers(50, 300)), int(rng.integers(1, 9)))
    groups = make_groups(classes.repeat(kept), size)
    assert groups.group.tolist() == np.arange(len(kept)).repeat(kept).tolist()


def test_without_two_groups_of_two_of_a_class_there_are_none():
    for label, size in ((np.arange(3).repeat(8), 1), (np.arange(3).repeat(4), 4), (np.arange(9), 4)):
        assert make_groups(label, size) is None
    assert make_groups(np.array([0, 0, 0, 0]), 2) is not None
    assert make_groups(np.array([0, 0, 0]), 2) is None, "the second has one image"


def intraclass(features, size):
    """ICC(1) by the mean squares between and within groups, summed over features."""
    groups = features.reshape(-1, size, features.shape[1])
    means = groups.mean(axis=1)
    between = size * np.square(means - features.mean(axis=0)).sum() / (len(groups) - 1)
    within = np.square(groups - means[:, None]).sum() / (len(groups) * (size - 1))
    return (between - within) / (between + (size - 1) * within)


@pytest.mark.parametrize("seed", range(4))
def test_in_one_class_it_is_the_intraclass_correlation(seed):
    rng = np.random.default_rng(seed)
    size, groups = int(rng.integers(2, 9)), int(rng.integers(2, 30))
    label = np.zeros(size * groups, int)
    features = rng.standard_normal((len(label), 7)) * rng.random(7) + rng.standard_normal((groups, 7)).repeat(size, 0)
    found = group_correlation(features.astype(np.float32), make_groups(label, size))
    assert found == pytest.approx(intraclass(features, size), rel=1e-5)


@pytest.mark.parametrize("in_turn", [False, True])
@pytest.mark.parametrize("size", [2, 4])
def test_it_equals_sums_over_pairs_one_by_one(size, in_turn):
    """Of classes of equal size, also if the last group of each is cut."""
    rng = np.random.default_rng(size)
    label = classes_of(3, 5, size, in_turn)
    label = label if in_turn else np.arange(3).repeat(5 * size - 1)
    features = rng.standard_normal((len(label), 4)) + 9 * label[:, None]
    groups = make_groups(label, size)
    sums = np.zeros((3, 2))  # of self, inside, outside: products and pairs
    for one in range(3):
        mean = features[label == one].mean(axis=0)
        for i in np.flatnonzero(label == one):
            for j in np.flatnonzero(label == one):
                kind = 0 if i == j else 1 if groups.group[i] == groups.group[j] else 2
                sums[kind] += (features[i] - mean) @ (features[j] - mean), 1
    own, inside, outside = sums[:, 0] / sums[:, 1]
    assert group_correlation(features, groups) == pytest.approx((inside - outside) / (own - outside), rel=1e-9)


def test_of_copies_it_is_1_of_opposites_minus_1_and_of_what_never_varies_0():
    rng = np.random.default_rng(0)
    label = classes_of(4, 6, 2)
    groups = make_groups(label, 2)
    one = rng.standard_normal((24, 5))
    assert group_correlation(one.repeat(2, axis=0), groups) == pytest.approx(1)
    opposite = np.stack([one, -one], axis=1).reshape(48, 5)
    assert group_correlation(opposite + label[:, None], groups) == pytest.approx(-1, abs=1e-12)
    assert group_correlation(np.ones((48, 5)), groups) == 0


@pytest.mark.parametrize("wanted", [-0.16, 0.0, 0.3])
def test_it_has_the_correlation_that_groups_were_drawn_with_whatever_their_class_is(wanted):
    """And no bias: few images of a class correlate by -1/(n - 1) about their mean, here -0.09."""
    rng = np.random.default_rng(1)
    size, found = 4, []
    root = np.linalg.cholesky((1 - wanted) * np.eye(size) + wanted)
    for _ in range(60):
        label = classes_of(20, 3, size)
        drawn = np.einsum("ij,gjd->gid", root, rng.standard_normal((60, size, 8))).reshape(-1, 8)
        found.append(group_correlation(drawn + 100 * label[:, None], make_groups(label, size)))
    error = np.std(found) / len(found) ** 0.5
    assert np.mean(found) == pytest.approx(wanted, abs=4 * error) and error < 0.004


def test_one_per_group_is_the_distance_of_their_first_images():
    rng = np.random.default_rng(2)
    label = classes_of(5, 20, 4)
    made, real = rng.standard_normal((400, 6)), rng.standard_normal((300, 6)) + 1
    generated = {FEATURES.name: (made.astype(np.float32),), GROUPS: make_groups(label, 4)}
    theirs = {MOMENTS.name: (real.mean(axis=0), np.cov(real, rowvar=False))}
    for name in ("fid_one_per_group", "fd_dinov2_one_per_group"):
        found = METRICS[name].compute(generated, theirs, CPU)
        assert found == pytest.approx(frechet_distance(made[::4], real), rel=1e-5)


def test_of_too_few_groups_a_distance_is_warned_of():
    made = np.random.default_rng(3).standard_normal((40, 20)).astype(np.float32)
    generated = {FEATURES.name: (made,), GROUPS: make_groups(np.zeros(40, int), 4)}
    with pytest.warns(UserWarning, match="10 images for 20 features"):
        METRICS["fid_one_per_group"].compute(generated, {MOMENTS.name: (np.zeros(20), np.eye(20))}, CPU)


def test_repelling_groups_are_nearer_than_independent_images_and_one_of_each_is_not():
    """Twenty images of N(0, 1) a time: pairs that repel have a better mean; one of each pair is as ten plain ones."""
    rng = np.random.default_rng(4)
    real = {MOMENTS.name: (np.zeros(2), np.eye(2))}
    grouped, plain, few, singles = [], [], [], []
    for _ in range(400):
        first, second = rng.standard_normal((2, 10, 2))
        repelled = np.stack([first, -0.8 * first + 0.6 * second], axis=1).reshape(20, 2)
        independent = rng.standard_normal((20, 2))
        for into, sample in ((grouped, repelled), (plain, independent), (few, independent[:10])):
            into.append(METRICS["fid"].compute({MOMENTS.name: (sample.mean(0), np.cov(sample.T))}, real, CPU))
        ours = {FEATURES.name: (repelled,), GROUPS: make_groups(np.zeros(20, int), 2)}
        singles.append(METRICS["fid_one_per_group"].compute(ours, real, CPU))
    assert np.mean(grouped) < 0.9 * np.mean(plain)
    assert np.mean(singles) == pytest.approx(np.mean(few), rel=0.1)


def test_samples_are_in_groups_if_samples_json_beside_them_says_so(tmp_path):
    label = classes_of(3, 2, 4)
    np.savez(tmp_path / "samples.npz", arr_0=np.zeros((24, 8, 8, 3), np.uint8), arr_1=label)
    np.savez(tmp_path / "other.npz", arr_0=np.zeros((24, 8, 8, 3), np.uint8), arr_1=label)

    def found(name):
        return read_groups(tmp_path / name, open_image_set(tmp_path / name))

    assert found("samples.npz") is None
    for sizes, expected in (((1, 4), 6), ((4, 4), 6), ((1, 1), None), ((2, None), 12)):
        about = dict(zip(("cond_group_size", "uncond_group_size"), sizes, strict=True))
        (tmp_path / "samples.json").write_text(json.dumps(about))
        groups = found("samples.npz")
        assert (groups and groups.group[-1] + 1) == expected and found("other.npz") is None
    for wrong in (label[:-1], np.array([{}] * 24)):
        np.savez(tmp_path / "samples.npz", arr_0=np.zeros((24, 8, 8, 3), np.uint8), arr_1=wrong)
        assert found("samples.npz") is None


def test_groups_of_a_folder_of_pictures_are_those_of_its_folders(tmp_path):
    from PIL import Image

    for number in range(24):  # groups of 4 of three classes in turn, as tools/sample.py writes them
        path = tmp_path / f"{number // 4 % 3:04d}/{number:06d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    (tmp_path / "samples.json").write_text('{"cond_group_size": 1, "uncond_group_size": 4}')
    groups = read_groups(tmp_path, open_image_set(tmp_path))
    assert groups == Groups(groups.group, groups.label)
    assert (
        groups.group.tolist() == np.arange(6).repeat(4).tolist()
        and groups.label.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    )
