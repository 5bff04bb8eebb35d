"""What batches are made of: images by number."""

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from torch import Tensor

from data.neighbors.exact import NeighborGraph
from data.randomness import Draws


class Pool(Protocol):
    """n images by number, of which groups can be formed and batches made."""

    @property
    def label(self) -> np.ndarray:
        """Class numbers, (n,) int64."""
        ...

    @property
    def shape(self) -> tuple[int, int, int]:
        """C, H, W of an image."""
        ...

    @property
    def posterior(self) -> bool:
        """Whether an image is a distribution to sample from: `Draws.posterior` then has the noise."""
        ...

    @property
    def mirrored(self) -> bool:
        """Whether `read` may return mirror images: `Draws.flip` then says which."""
        ...

    @property
    def extra(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of further tensors of an image, by name: what a loss term may ask for (see Batch.extra)."""
        ...

    def read(self, numbers: np.ndarray, draws: Draws) -> Tensor:
        """Return the images `numbers` (b,), (b, C, H, W) float32. All that is random about them is in `draws`."""
        ...

    def read_extra(self, numbers: np.ndarray, draws: Draws, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Return the tensors `names`, all in `extra`, of the images `numbers` (b,): (b, *shape) each. They are those of
        the mirror image where `read` returns that."""
        ...

    def neighbors(self, k: int) -> NeighborGraph:
        """Return the k most similar others of each image. Raise DataError if they are not known."""
        ...
