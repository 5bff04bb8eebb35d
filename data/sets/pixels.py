"""Pixels as training sees them: centre crops in a store of memory-mapped shards."""

import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.errors import DataError
from data.randomness import Draws
from data.sets.arrays import ArrayImages
from data.sets.stored import StoredImages, check_expected
from data.stores.store import read_manifest

MADE_BY = "tools/precompute_pixels.py"
MAIN = "pixels"  # the field that holds the images
MOST_IN_MEMORY = 20_000  # images to train a small classifier on and compare samples to


class Pixels(StoredImages):
    """The crops of a store, by number. Raise DataError if they differ from `expected` (channels, side; None: any)."""

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

    def halves(self) -> tuple[ArrayImages, ArrayImages]:
        """Return four fifths of the images and the remaining fifth, chosen by checksums of their keys and so the same
        for every run on these images. Use at most MOST_IN_MEMORY images. Raise DataError if a part has no image of a
        class."""
        place = np.array([zlib.crc32(key) for key in self._store.index["key"]], np.uint32)
        chosen = np.argsort(place, kind="stable")[:MOST_IN_MEMORY]
        heldout = place[chosen] % 5 == 0
        parts = []
        for numbers in (np.sort(chosen[~heldout]), np.sort(chosen[heldout])):
            label = self.label[numbers]
            if missing := set(range(self.num_classes)) - set(label.tolist()):
                raise DataError(
                    f"data.pixels={self._folder}: too few images of class {min(missing)} to keep a fifth of them for"
                    " comparison"
                )
            x = self._store.read(MAIN, numbers).astype(np.float32) / 127.5 - 1
            parts.append(ArrayImages(x, label, x.reshape(len(x), -1), self.num_classes))
        return parts[0], parts[1]
