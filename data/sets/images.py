"""The contract of an image set: what a run requires of the images that it trains on.

To add a set, return an ArrayImages (images in memory) or derive from ByNumber (any image can be read at any time), and
add a line to SETS in data/sets/registry.py.
"""

from collections.abc import Iterable, Mapping
from typing import Protocol, Self

import numpy as np

from data.batches.batch import Batch
from data.batches.loader import planned_batches
from data.batches.pool import Pool
from data.batches.steps import OnPlan, Steps


class Images(Protocol):
    """An image set."""

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        ...

    @property
    def shape(self) -> tuple[int, int, int]:
        """C, H, W of an image."""
        ...

    @property
    def vae(self) -> str | None:
        """Folder or name of the VAE that decodes the images. None: they are pixels."""
        ...

    @property
    def identity(self) -> str:
        """What distinguishes these images from others, wherever their files are: a run resumes only on the same
        ones."""
        ...

    @property
    def extra(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of the extra tensors of an image, by name, which loss terms may ask for (see Batch.extra)."""
        ...

    def __len__(self) -> int: ...

    def max_neighbors(self) -> int:
        """Return the number of known neighbors of each image. Raise DataError if there are none."""
        ...

    def pool(self) -> Pool:
        """Return images by number to form groups from: all, or as many as fit in memory."""
        ...

    def batches(self, steps: Steps, on_plan: OnPlan) -> Iterable[list[Batch]]:
        """Return an iterable of the micro-batches of each step. If there are plans, call `on_plan` with the plan of
        each epoch when the epoch begins."""
        ...

    def resume_note(self, before: int, now: int) -> str | None:
        """Return what the user should know when a run of world size `before` resumes on `now` ranks. None: nothing."""
        ...


class ByNumber:
    """Base of sets that can read any image at any time: they are pools, and their batches are planned."""

    label: np.ndarray

    def __len__(self) -> int:
        return len(self.label)

    def pool(self) -> Self:
        """Return all images."""
        return self

    def batches(self: Pool, steps: Steps, on_plan: OnPlan) -> Iterable[list[Batch]]:
        """Return the batches that the plans of the epochs determine."""
        return planned_batches(self, steps, on_plan)

    def resume_note(self, before: int, now: int) -> None:
        """Return None: the order of the images does not depend on the world size."""
