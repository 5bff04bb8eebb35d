"""The whole evaluation over its bare detector, which is made up: as dear as Inception, 2048 features."""

import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import Figures, Targets
from benchmarks.memory import MALLOC, megabytes, on_ranks, reset_peak
from trainer.evaluation.by_detector import evaluate_images, open_detector
from trainer.evaluation.statistics import BATCH
from trainer.ranks import Ranks

IMAGES, REFERENCE = 50_000, 10_000  # as published figures have
SIDE, SMALL = 256, 32  # pixels; small ones where only the number of images counts
BATCHES = 3


class Dear(nn.Module):
    """Convolutions of a picture of 299 pixels: 5.9 billion multiplications and additions; Inception v3 has 5.7."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [(3, 32, 2), (32, 64, 1), (64, 80, 2), (80, 192, 1), (192, 320, 2), (320, 384, 1), (384, 512, 1)]
        self.layers = nn.Sequential(*(nn.Sequential(nn.Conv2d(i, o, 3, s), nn.ReLU()) for i, o, s in sizes))
        self.last = nn.Conv2d(512, 2048, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 images -> 2048 features, 2023 spatial ones."""
        x = self.layers(nn.functional.interpolate(x.float() / 255, (299, 299), mode="bilinear"))
        return self.last(x).relu().mean((2, 3)), nn.functional.interpolate(x[:, :7], (17, 17)).flatten(1)


class Cheap(nn.Module):
    """As many features of a few pixels."""

    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(192, 2048))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 images -> 2048 features, 2023 spatial ones."""
        features = (nn.functional.adaptive_avg_pool2d(x.float() / 255, (8, 8)).flatten(1) @ self.weight).relu()
        return features, features[:, :2023]


def measure() -> tuple[Figures, Targets]:
    """In one process. The dear detector gives the cost of an image, alone; the cheap one that of all the rest: reading,
    moments, distances, KID, precision and recall of 50,000 images and 10,000 real ones, and their memory."""

    os.environ |= MALLOC  # of the process that it starts
    (figures,) = on_ranks(1, _measure)
    return figures, {"over_bare": (">=", 0.95), "mb_beyond_detector": ("<", 1000)}


def _measure(ranks: Ranks) -> Figures:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind in (Dear, Cheap):
            torch.jit.save(torch.jit.script(kind().eval()), str(folder / f"{kind.__name__}.pt"))
        bare = _seconds_of_detector(folder / "Dear.pt")
        detector = open_detector(str(folder / "Cheap.pt"), ranks)
        rng = np.random.default_rng(0)
        for number in (BATCH, REFERENCE, IMAGES):
            np.savez(folder / f"{number}.npz", arr_0=rng.integers(256, size=(number, SMALL, SMALL, 3), dtype=np.uint8))
        evaluate_images(detector, folder / f"{BATCH}.npz", folder / f"{BATCH}.npz", None, ranks)  # loads all code
        before = reset_peak()
        start = time.perf_counter()
        evaluate_images(detector, folder / f"{IMAGES}.npz", folder / f"{REFERENCE}.npz", None, ranks)
        rest = time.perf_counter() - start
        return {
            "bare_images_per_s": 1 / bare,
            "images_per_s": IMAGES / (IMAGES * bare + rest),
            "over_bare": IMAGES * bare / (IMAGES * bare + rest),
            "seconds_of_the_rest": rest,
            "mb_beyond_detector": megabytes("VmHWM") - before,
        }


def _seconds_of_detector(path: Path) -> float:
    """Of an image, without anything around the network."""
    network = torch.jit.load(str(path)).eval()
    images = torch.randint(256, (BATCH, 3, SIDE, SIDE), dtype=torch.uint8)
    with torch.inference_mode():
        for _ in range(2):  # TorchScript looks at the first calls
            network(images[:2])
        start = time.perf_counter()
        for _ in range(BATCHES):
            network(images)
    return (time.perf_counter() - start) / BATCHES / BATCH
