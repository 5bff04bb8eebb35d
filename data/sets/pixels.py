"""Pixels as training sees them: centre crops in a store, which lies in memory-mapped shards."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.randomness import Draws
from data.sets.stored import StoredImages, check_expected
from data.stores.store import read_manifest

MADE_BY = "tools/precompute_pixels.py"


class Pixels(StoredImages):
    """The images of a store by number; see data.sets.registry.Images. DataError where `expected` (channels, side;
    None: any) is not so."""

    posterior = False
    vae = None

    def __init__(self, folder: str, neighbors: str | None, flip: bool, expected: dict[str, float | None]) -> None:
        manifest = read_manifest(Path(folder), "pixels", MADE_BY)
        super().__init__(folder, manifest, neighbors)
        channels, height, width = manifest["fields"]["pixels"]["shape"]
        check_expected("pixels", folder, expected, {"channels": channels, "side": width})
        self.shape = channels, height, width
        self.identity = f"keys {manifest['keys'][:12]}, {width} pixels"
        self._flip = flip

    def read(self, numbers: np.ndarray, draws: Draws) -> Tensor:
        """The crops in [-1, 1], or their mirror images."""
        pixels = self._store.read("pixels", numbers)
        if self._flip:
            pixels[draws.flip] = pixels[draws.flip][..., ::-1]
        return torch.from_numpy(pixels).float().div_(127.5).sub_(1)
