"""The linear probe: features by an independent way, images whose class is plain to see, and its own noise alone."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from data.sets.arrays import ArrayImages
from data.sets.form import ImageForm
from data.sets.registry import open_images
from models.backbones.registry import make_network
from trainer.analysis.probe import features, linear_probe
from trainer.build import build_network
from trainer.checkpoints import folder as checkpoint
from trainer.checkpoints.weights import WeightSource, find_checkpoint
from trainer.config.tree import load_config
from trainer.loop import train
from trainer.sampling.networks import Loaded, Networks

CONFIG = "tests/trainer/tiny.yaml"
JIT = ["model.backbone=jit", "model.context_tokens=3", "model.context_start=1", "path=jit"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that has learned something."""
    folder = tmp_path_factory.mktemp("probe") / "run"
    config = load_config(CONFIG, ["engine=single", "train.images=3200", "optim.lr=5e-3", f"run={folder}"])
    train(config)
    return find_checkpoint(folder), config


def loaded(network, config):
    return Loaded(config, ImageForm((1, 8, 8), 10, None), Networks(network), torch.device("cpu"))


def some_images(config, number=11, seed=0):
    """Random ones of the config's form."""
    rng = np.random.default_rng(seed)
    x, label = rng.normal(size=(number, 1, 8, 8)).astype(np.float32), rng.integers(10, size=number)
    return ArrayImages(x, label, x.reshape(number, -1), 10)


@pytest.mark.parametrize("overrides", [[], JIT])
def test_features_are_means_of_the_patches_after_each_block(random_weights, overrides):
    config = load_config(CONFIG, [*overrides, "sample.batch=4"])
    network, images = random_weights(make_network(config.model, 1, 8, 10, 1), 3), some_images(config)
    seen = []
    for block in network.blocks:
        block.register_forward_pre_hook(lambda block, args: seen.append(args[0]))
    network.final_layer.register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    numbers = np.array([3, 1, 7])
    found = features(loaded(network, config), images, numbers, 0.3)
    for layer, tokens in enumerate(seen[1:]):  # what a block gives is what the next one gets
        assert torch.equal(torch.from_numpy(found[layer]), tokens[:, -16:].mean(dim=1)), layer
    assert len(found) == len(network.blocks) == len(seen) - 1


def test_features_depend_on_no_batch_and_on_no_class(random_weights):
    config = load_config(CONFIG, ["sample.batch=4"])
    network, images = random_weights(make_network(config.model, 1, 8, 10, 1), 3), some_images(config)
    numbers = np.arange(11)
    found = features(loaded(network, config), images, numbers, 0.5)
    whole = config.model_copy(update={"sample": config.sample.model_copy(update={"batch": 11})})
    np.testing.assert_allclose(found, features(loaded(network, whole), images, numbers, 0.5), atol=1e-5)
    other = ArrayImages(images.x, 9 - images.label, images.features, 10)
    assert np.array_equal(found, features(loaded(network, config), other, numbers, 0.5))
    assert not np.allclose(found, features(loaded(network, config), images, numbers, 0.6), atol=1e-3)


def test_digits_are_read_best_where_there_is_little_noise_and_not_at_all_where_there_is_nothing_else(run):
    probe = linear_probe(WeightSource(run[0]), run[1], [-14.0, 0.0, 8.0], 10_000)
    noise, _, clean = probe.accuracy.T
    assert probe.accuracy.shape == (2, 3) and np.allclose(probe.levels, [-14, 0, 8], atol=0.2)
    assert (probe.train_images, probe.test_images) == tuple(
        len(open_images(run[1].data, split)) for split in ("train", "heldout")
    )
    assert np.all(clean > 0.6) and np.all(noise < 0.25) and np.all(probe.accuracy[:, 1] > noise)


def test_accuracy_is_that_of_a_regression_by_hand(run):
    folder, config = run
    probe = linear_probe(WeightSource(folder), config, [4.0], 300)
    rng = np.random.default_rng([config.seed, 1])
    sets = [open_images(config.data, split) for split in ("train", "heldout")]
    chosen = [rng.permutation(len(images))[:300] for images in sets]
    network = build_network(config, sets[0])
    checkpoint.load(folder, {"ema": network.state_dict()})
    t = torch.linspace(0, 1, 100_001)
    share = float(t[(2 * (t / (1 - t)).log() - 4).abs().nan_to_num(9).argmin()])
    x, y = (
        features(loaded(network, config), images, numbers, share)[1]
        for images, numbers in zip(sets, chosen, strict=True)
    )
    scaler = StandardScaler().fit(x)
    regression = LogisticRegression(max_iter=1000).fit(scaler.transform(x), sets[0].label[chosen[0]])
    expected = np.mean(regression.predict(scaler.transform(y)) == sets[1].label[chosen[1]])
    assert probe.accuracy[1, 0] == pytest.approx(expected, abs=0.011)  # of 300 images, three
