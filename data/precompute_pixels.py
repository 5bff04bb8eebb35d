"""Centre crops of an image set: what each process of tools/precompute_pixels.py does."""

from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from data.extraction.crop import center_crop
from data.extraction.extract import Work, extract

BATCH = 32  # images that a worker prepares at once


def precompute_pixels(
    images: Path,
    out: Path,
    image_size: int,
    part_size: int,
    workers: int,
    max_rejects: int,
    process: int = 0,
    processes: int = 1,
) -> dict | None:
    """uint8 (3, size, size) of every image; not of its mirror image, which is the same numbers in another order.
    Returns the manifest, or None if other processes still make shards."""
    settings = {"size": image_size, "transform": "ADM centre crop"}

    def prepare(image: Image.Image) -> np.ndarray:
        return center_crop(image, image_size).transpose(2, 0, 1)

    def encode(pixels: Tensor) -> dict[str, np.ndarray]:
        return {"pixels": pixels.numpy()}

    work = Work("pixels", images, out, settings, prepare, encode, part_size, BATCH, workers, max_rejects)
    return extract(work, process, processes)
