"""Images that fit in memory."""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from data.neighbors.exact import NeighborGraph, nearest_neighbors
from data.randomness import Draws
from data.sets.images import ByNumber


@dataclass(frozen=True)
class ArrayImages(ByNumber):
    """x (n, C, H, W) float32 in [-1, 1], label (n,) int64; neighbors have similar `features` (n, d). `further` holds
    the extra arrays (n, ...) that loss terms may ask for, by name."""

    x: np.ndarray
    label: np.ndarray
    features: np.ndarray
    num_classes: int
    further: Mapping[str, np.ndarray] = field(default_factory=dict)
    posterior = mirrored = False
    vae = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """C, H, W of an image."""
        channels, height, width = self.x.shape[1:]
        return channels, height, width

    @property
    def identity(self) -> str:
        """A checksum of the images."""
        return f"{zlib.crc32(self.x.tobytes()):08x}"

    @property
    def extra(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the extra arrays of an image."""
        return {name: array.shape[1:] for name, array in self.further.items()}

    def read(self, numbers: np.ndarray, draws: Draws) -> torch.Tensor:
        """Return the images unchanged."""
        return torch.from_numpy(self.x[numbers])

    def read_extra(self, numbers: np.ndarray, draws: Draws, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
        """Return the extra arrays unchanged."""
        return {name: torch.from_numpy(self.further[name][numbers]) for name in names}

    def max_neighbors(self) -> int:
        """Return the number of other images."""
        return len(self) - 1

    def neighbors(self, k: int) -> NeighborGraph:
        """Return the k nearest to each image by the cosine of their features."""
        return nearest_neighbors(self.features, k)
