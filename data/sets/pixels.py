"""Pixels as training sees them: centre crops in a store, which lies in memory-mapped shards."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.randomness import Draws
from data.sets.stored import StoredImages, check_expected
from data.stores.store import read_manifest

MADE_BY = "tools/precompute_pixels.py"
MAIN = "pixels"  # the field of the images


class Pixels(StoredImages):
    """The crops of a store, by number. Raise DataError if they are not as `expected` (channels, side; None: any)."""

    posterior = False
    vae = None

    def __init__(self, folder: str, neighbors: str | None, flip: bool, expected: dict[str, float | None]) -> None:
        manifest = read_manifest(Path(folder), "pixels", MADE_BY)
        super().__init__(folder, manifest, MAIN, neighbors, flip)
        channels, height, width = manifest["fields"][MAIN]["shape"]
        check_expected("pixels", folder, expected, {"channels": channels, "side": width})
        self.shape = channels, height, width
        self.identity = f"keys {manifest['keys'][:12]}, {width} pixels"

    def read(self, numbers: np.ndarray, draws: Draws) -> Tensor:
        """Return the crops in [-1, 1], or their mirror images."""
        pixels = self._store.read(MAIN, numbers)
        flip = self.flipped(numbers, draws)
        pixels[flip] = pixels[flip][..., ::-1]
        return torch.from_numpy(pixels).float().div_(127.5).sub_(1)
