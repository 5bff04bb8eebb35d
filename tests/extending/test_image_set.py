"""An image set: coloured squares, made in memory. It is this file, and one line in SETS."""

import numpy as np
import pytest
import torch

from data.sets.arrays import ArrayImages
from data.sets.registry import SETS, in_memory
from tests.trainer.forked import TINY
from trainer.analysis.probe import linear_probe
from trainer.checkpoints.weights import WeightSource, find_checkpoint, read_weights
from trainer.config.tree import load_config
from trainer.errors import RunError
from trainer.loop import train
from trainer.sampling.samples import make_samples

COLORS = np.array([[1, -1, -1], [-1, 1, -1], [-1, -1, 1]], np.float32)


def load(split):
    """Return squares of three colours, the classes, at random places; others for each split."""
    rng = np.random.default_rng(split == "heldout")
    number = {"train": 192, "heldout": 48}[split]
    label, place = rng.integers(3, size=number), rng.integers(5, size=(number, 2))
    x = np.full((number, 3, 8, 8), -1, np.float32)
    for image, color, (row, column) in zip(x, COLORS[label], place, strict=True):
        image[:, row : row + 4, column : column + 4] = color[:, None, None]
    return ArrayImages(x, label, features=place + 1, num_classes=3)  # neighbors are at similar places


@pytest.fixture(autouse=True)
def squares(monkeypatch):
    monkeypatch.setitem(SETS, "squares", in_memory(load))


def config(run, *overrides):
    return load_config(TINY, [f"run={run}", "data.name=squares", "engine=single", *overrides])


def test_a_run_on_squares_trains_resumes_and_samples(tmp_path):
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    assert train(config(whole, "evaluate.every=320")) == "finished"  # by a classifier, on the held-out squares
    train(config(halved, "train.images=320"))
    train(config(halved))
    source = WeightSource(find_checkpoint(halved))
    expected, found = (read_weights(find_checkpoint(run)) for run in (whole, halved))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())

    pixels, label, _ = make_samples(source, config(halved))
    assert pixels.shape == (3, 2, 8, 8, 3) and label.tolist() == [[0, 0], [1, 1], [2, 2]]
    assert linear_probe(source, config(halved), [0.0], 100).test_images == 48


def test_a_set_that_is_not_there_is_named_with_those_that_are(tmp_path, monkeypatch):
    monkeypatch.delitem(SETS, "squares")
    with pytest.raises(RunError, match=r"^data\.name=squares: input should be 'digits', 'glyphs', .* or 'pixels'"):
        config(tmp_path)


def test_a_field_of_other_sets_is_refused(tmp_path):
    with pytest.raises(RunError, match=r"^data\.side=8: is for name=latents or pixels; set that, or leave side out"):
        config(tmp_path, "data.side=8")
