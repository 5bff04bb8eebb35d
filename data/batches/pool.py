"""What batches are made from: images by number."""

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from torch import Tensor

from data.neighbors.exact import NeighborGraph
from data.randomness import Draws


class Pool(Protocol):
    """n images by number, which groups can be formed and batches made from."""

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
        """Whether an image is a distribution to sample from; `Draws.posterior` then has the noise."""
        ...

    @property
    def mirrored(self) -> bool:
        """Whether `read` may return mirror images; `Draws.flip` then says which."""
        ...

    @property
    def extra(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of the extra tensors of an image, by name, which loss terms may ask for (see Batch.extra)."""
        ...

    def read(self, numbers: np.ndarray, draws: Draws) -> Tensor:
        """Return the images `numbers` (b,) as (b, C, H, W) float32. All their random numbers are in `draws`."""
        ...

    def read_extra(self, numbers: np.ndarray, draws: Draws, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Return the tensors `names`, all in `extra`, of the images `numbers` (b,): (b, *shape) each. Where `read`
        returns the mirror image, so does this."""
        ...

    def neighbors(self, k: int) -> NeighborGraph:
        """Return the k other images most similar to each image. Raise DataError if they are not known."""
        ...
