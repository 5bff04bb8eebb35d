"""What each test of a toy does with it: train, be stopped, resume, sample."""

import torch

from tests.trainer.forked import TINY
from trainer.checkpoints.weights import WeightSource, find_checkpoint, read_weights
from trainer.config.tree import load_config
from trainer.loop import train
from trainer.run_folder import read_config
from trainer.sampling.samples import make_samples


def tiny(run, *overrides):
    return load_config(TINY, [f"run={run}", "engine=single", "train.images=128", "checkpoint.every=64", *overrides])


def train_resume_and_sample(folder, *overrides):
    """Train a tiny run whole and in halves, which must end with the same weights, and sample from it as its stored
    config says. Return its weights and samples."""
    whole, halved = folder / "whole", folder / "halved"
    assert train(tiny(whole, *overrides)) == "finished"
    train(tiny(halved, *overrides, "train.images=64"))
    train(tiny(halved, *overrides))
    expected, found = (read_weights(find_checkpoint(run)) for run in (whole, halved))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    pixels, *_ = make_samples(WeightSource(find_checkpoint(halved)), read_config(halved))
    assert pixels.shape == (10, 2, 8, 8, 1)
    return found, pixels
