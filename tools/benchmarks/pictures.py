"""Real photographs for the benchmarks: crops of those that come with scikit-learn, as JPEG files in class folders."""

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images


def write_pictures(folder: Path, number: int, classes: int = 4) -> None:
    """`number` JPEGs of about ImageNet's sizes (about 350 x 420 pixels)."""
    rng = np.random.default_rng(0)
    photographs = load_sample_images().images
    for i in range(number):
        photograph = photographs[i % len(photographs)]
        height, width = rng.integers(300, 420), rng.integers(300, 560)
        top, left = (rng.integers(photograph.shape[axis] - side) for axis, side in ((0, height), (1, width)))
        path = folder / f"class{i % classes}" / f"{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photograph[top : top + height, left : left + width]).save(path, quality=92)
