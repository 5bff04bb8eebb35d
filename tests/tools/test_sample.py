"""tools/sample.py: how classes are dealt, and what becomes of samples that are not finite."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.in_process import call
from tests.trainer.forked import train_tiny
from trainer.checkpoints.weights import read_weights


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample") / "run"
    train_tiny(f"run={folder}", "engine=single", "train.images=64", "groups.size=4")
    return folder


@pytest.fixture(scope="module")
def spoiled(run):
    """Weights that are not finite for classes 6 and 8."""
    weights = read_weights(run)
    weights["y_embedder.embedding_table.weight"][[6, 8]] = torch.nan
    save_file(weights, run / "spoiled.safetensors")
    return run / "spoiled.safetensors"


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_there_are_as_many_of_each_class_at_any_group_size(run, tmp_path, size):
    said = call("sample", run, "--num", 60, "--out", tmp_path / "out", f"sample.uncond_group_size={size}")
    assert "60 images" in said.out
    with np.load(tmp_path / "out/samples.npz") as file:
        assert np.bincount(file["arr_1"]).tolist() == [6] * 10
    assert json.loads((tmp_path / "out/samples.json").read_text())["labels"] == "balanced"


def test_random_classes_are_for_a_number_of_images(run, tmp_path):
    sweep = "--sweep", "sample.labels=balanced,random"
    for arguments in (("sample", run, "sample.labels=random"), ("evaluate", run, *sweep)):
        error = call(*arguments, "--out", tmp_path / "out", code=1).err.splitlines()[-1]  # after the bar
        assert error.startswith("error: sample.labels=random: sample.per_class=2 ")
    assert not (tmp_path / "out").exists(), "it is said before the work"
    call("sample", run, "--num", 14, "--out", tmp_path / "out", "sample.labels=random")
    assert json.loads((tmp_path / "out/samples.json").read_text())["labels"] == "random"


@pytest.mark.parametrize("sampler", ["heun", "dopri5"])
@pytest.mark.parametrize("many", [False, True])
def test_samples_that_are_not_finite_are_one_line(run, spoiled, tmp_path, sampler, many):
    """Which names the first of class 6: of 2 of each class, or of the group of 4 whose turn comes after six others."""
    out = tmp_path / "out"
    options = ["--num", 60] if many else []
    error = call(
        "sample", run, "--weights", spoiled, "--out", out, *options, f"sample.sampler={sampler}", code=1
    ).err.splitlines()[-1]
    when = "in dopri5" if sampler == "dopri5" else "after step 1 of 2"
    assert error.startswith(f"error: weights={spoiled}: image {24 if many else 12} is not finite {when}; ")
    assert not (out / "samples.json").exists() and not [*out.glob("**/*.npz")] and not [*out.glob("*.png")]
