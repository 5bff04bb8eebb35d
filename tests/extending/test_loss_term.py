"""How to add a loss term: a class, and one line in TERMS. `Mean` is the simplest; `Align` has a layer of its own, looks
inside the network and asks for a further tensor of each image."""

import json

import pytest
import torch.nn.functional as F
from pydantic import Field
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from data.sets import digits
from data.sets.arrays import ArrayImages
from data.sets.registry import SETS, ImageSet
from models.objectives.registry import TERMS
from models.objectives.term import Term, TermConfig
from tests.trainer.forked import TINY
from trainer.checkpoints.weights import WeightSource, export_weights, find_checkpoint
from trainer.config.tree import load_config
from trainer.errors import RunError
from trainer.loop import train
from trainer.sampling.samples import make_samples


class Mean(Term):
    """Penalise the square of the mean of each prediction: `loss.mean.weight=0.1`."""

    def __call__(self, forward, batch, path):
        return forward.prediction.flatten(1).mean(dim=1).square()


class Align(Term):
    """Align the output of a block with features of each patch, through a layer of its own (REPA, arXiv 2410.06940)."""

    class Config(TermConfig):
        block: int = Field(0, ge=0)
        """Block whose output is aligned, from 0."""

    extra = ("features",)

    def __init__(self, config, network, extra):
        super().__init__(config, network, extra)
        self.hidden = (config.block,)
        self.modules = nn.Linear(network.config.width, extra["features"][-1])

    def __call__(self, forward, batch, path):
        projected = self.modules(forward.hidden[self.config.block])
        return 1 - F.cosine_similarity(projected.float(), batch.extra["features"], dim=-1).mean(dim=1)


def open_patches(config, split):
    """The digits, with the pixels of each patch of 2 x 2 as its features, (16, 4)."""
    x, *others = digits.load(split)
    patches = x.reshape(-1, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(-1, 16, 4)
    return ArrayImages(x, *others, {"features": patches})


@pytest.fixture(autouse=True)
def lines_in_the_dicts(monkeypatch):
    monkeypatch.setitem(TERMS, "mean", Mean)
    monkeypatch.setitem(TERMS, "align", Align)
    monkeypatch.setitem(SETS, "patches", ImageSet(open_patches))


TOYS = ["data.name=patches", "loss.mean.weight=0.1", "loss.align={weight: 0.5, block: 1}"]


def run(folder, *overrides):
    config = load_config(TINY, ["engine=single", f"run={folder}", "checkpoint.every=320", *overrides])
    train(config)
    return config, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_terms_of_ones_own_train_save_resume_and_sample(tmp_path):
    config, whole = run(tmp_path / "whole", *TOYS)
    run(tmp_path / "halves", *TOYS, "train.images=320")
    _, halves = run(tmp_path / "halves", *TOYS)
    assert halves == whole and len(whole) == 20
    for row in whole:
        parts = row["loss/denoising"] + 0.1 * row["loss/mean"] + 0.5 * row["loss/align"]
        assert row["loss"] == pytest.approx(parts, abs=1e-5)
    assert whole[-1]["loss/align"] < 0.9 * whole[0]["loss/align"]  # it learns

    board = EventAccumulator(str(tmp_path / "whole")).Reload()
    assert [event.step for event in board.Scalars("train/loss/align")] == list(range(32, 641, 32))
    export_weights(tmp_path / "whole", tmp_path / "exported.safetensors")
    weights = load_file(tmp_path / "exported.safetensors")
    assert "blocks.0.attn.qkv.weight" in weights and not [name for name in weights if "align" in name]
    pixels, label, _ = make_samples(WeightSource(find_checkpoint(tmp_path / "whole")), config)
    assert pixels.shape == (10, 2, 8, 8, 1) and label.shape == (10, 2)


def test_the_first_step_is_that_of_a_run_without_terms(tmp_path):
    """The weights of a term come from a random stream of their own."""
    _, plain = run(tmp_path / "plain", "train.images=64")
    _, added = run(tmp_path / "added", "train.images=64", *TOYS)
    assert added[0]["loss/denoising"] == plain[0]["loss"] and added[1]["loss/denoising"] != plain[1]["loss"]
    assert not any("/" in name for name in plain[0])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("loss.alin.weight=1", "loss.alin: no such loss term; did you mean align?"),
        ("loss.align.blok=1", "loss.align.blok=1: no such field; did you mean loss.align.block?"),
        ("loss.mean.weight=-1", "loss.mean.weight=-1: input should be greater than or equal to 0"),
        ("loss.mean=0.1", "loss.mean=0.1: is a section of fields; set one of them, as loss.mean.weight=..."),
        ("loss.align.block=2", "loss.align: asks for block 2; blocks are 0 to 1"),
        ("data.name=digits", "loss.align: needs features of each image, which the images do not offer; they have none"),
        ("loss.mean.weight=0.2", "loss.mean.weight=0.2: the run in .* has loss.mean.weight=0.1; set it back"),
    ],
)
def test_a_term_that_does_not_fit_is_refused_in_one_line(tmp_path, override, said):
    if "the run in" in said:
        run(tmp_path, *TOYS, "train.images=32")
    with pytest.raises(RunError, match=said):
        run(tmp_path, *TOYS, override)
    assert "the run in" in said or not (tmp_path / "metrics.jsonl").exists()


def test_a_term_that_is_gone_makes_another_run(tmp_path):
    run(tmp_path, "loss.mean.weight=0.1", "train.images=32")
    with pytest.raises(RunError, match=r"loss.mean.weight=None: the run in .* has loss.mean.weight=0.1; set it back"):
        run(tmp_path)
