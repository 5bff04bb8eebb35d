"""Linear probe: how well a linear classifier tells an image's class from features inside the network, by layer and
noise level (as in Yu et al., REPA, arXiv 2410.06940, sec. 3)."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from data.batches.batch import MicroBatch, make_batch
from data.batches.pool import Pool
from data.sets.registry import SETS
from models.objectives.denoising import denoising_loss
from models.paths.base import quantile_at
from models.paths.registry import make_path
from trainer.build import open_data
from trainer.checkpoints.weights import WeightSource
from trainer.config.tree import Config
from trainer.errors import RunError
from trainer.sampling.networks import Loaded, load

TEST_SHARE = 0.2  # share of the images to test on where none are held out


class Probe(NamedTuple):
    """Share of test images classified correctly from features after each layer, (layers, levels); and the log-SNRs."""

    accuracy: np.ndarray
    levels: np.ndarray
    train_images: int
    test_images: int


def linear_probe(
    source: WeightSource,
    config: Config,
    levels: list[float],
    number: int,
    progress: Callable[[int], object] = lambda images: None,
) -> Probe:
    """Probe a network on at most `number` images of its run's data at these log-SNRs.

    Each image is passed alone and without its class, so nothing but its own noisy pixels can reveal it. Test on the
    held-out images, or on a fifth of the images where there are none. Raise RunError if there are too few.
    """
    images, rng = open_data(config), np.random.default_rng([config.seed, 1])
    loaded = load(source, config)
    pool = images.pool()
    chosen = rng.permutation(len(pool.label))[:number]
    if SETS[config.data.name].heldout:
        heldout = open_data(config, "heldout").pool()
        train, test = (pool, chosen), (heldout, rng.permutation(len(heldout.label))[:number])
    else:
        cut = int(len(chosen) * TEST_SHARE)
        train, test = (pool, chosen[cut:]), (pool, chosen[:cut])
    labels = [source.label[numbers] for source, numbers in (train, test)]
    if len(np.unique(labels[0])) < 2 or not len(labels[1]):
        raise RunError(f"--images {number}: {len(labels[0])} to learn from, of one class, or none to test; give more")
    path, accuracy, found = make_path(config.path), [], []
    for wanted in levels:
        share, level = quantile_at(path, wanted)
        parts = [features(loaded, *part, share, progress) for part in (train, test)]
        accuracy.append([_accuracy(*labels, *layer) for layer in zip(*parts, strict=True)])
        found.append(level)
    return Probe(np.array(accuracy).T, np.array(found), len(labels[0]), len(labels[1]))


def features(
    loaded: Loaded,
    images: Pool,
    numbers: np.ndarray,
    share: float,
    progress: Callable[[int], object] = lambda images: None,
) -> np.ndarray:
    """Return (layers, n, width) float32: the mean over an image's patches after each block, for images `numbers` (n,)
    at this share of the path's timesteps. An image's noise depends on its place in `numbers`."""
    network, config = loaded.networks.network, loaded.config
    path, patches = make_path(config.path), (images.shape[-1] // config.model.patch) ** 2
    found: list[list[Tensor]] = [[] for _ in network.blocks]

    def keep(layer: int, tokens: Tensor) -> None:
        found[layer].append(tokens[:, -patches:].float().mean(dim=1).cpu())  # without class tokens

    settings = config.groups, config.model.slots, config.seed
    with ExitStack() as hooks, loaded.inference():
        for layer, block in enumerate(network.blocks):
            hooks.callback(block.register_forward_hook(lambda *args, layer=layer: keep(layer, args[-1])).remove)
        for start in range(0, len(numbers), config.sample.batch):
            part = numbers[start : start + config.sample.batch]
            batch = make_batch(images, *settings, MicroBatch(start, part, in_groups=False))
            batch = replace(batch, u=torch.full_like(batch.u, share), conditional=torch.zeros_like(batch.conditional))
            denoising_loss(network, path, batch.to(loaded.device))
            progress(len(part))
    return torch.stack([torch.cat(parts) for parts in found]).numpy()


def _accuracy(train_label: np.ndarray, test_label: np.ndarray, train: np.ndarray, test: np.ndarray) -> float:
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return float(classifier.fit(train, train_label).score(test, test_label))


def probe_map(probe: Probe) -> Figure:
    """Plot the accuracies by layer and noise level."""
    figure = Figure((1.2 + 0.8 * len(probe.levels), 1.6 + 0.3 * len(probe.accuracy)), dpi=100, layout="constrained")
    axes = figure.subplots()
    shown = axes.imshow(100 * probe.accuracy, aspect="auto", origin="lower")
    figure.colorbar(shown, ax=axes)
    axes.set(xlabel="log-SNR (noisy to clean)", ylabel="after layer", title="linear probe: classes found, %")
    axes.set_xticks(range(len(probe.levels)), [f"{level:.1f}" for level in probe.levels])
    return figure
