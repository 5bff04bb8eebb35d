"""The images that a run trains on, and where they come from."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import BaseModel, Field

from data import digits


class DataConfig(BaseModel, extra="forbid", frozen=True):
    """Which images, and how they are read."""

    name: Literal["digits"] = "digits"
    workers: int = Field(0, ge=0)  # processes per rank that prepare batches; 0: in the training process


@dataclass(frozen=True)
class Images:
    """x (n, C, H, W) float32 in [-1, 1], label (n,) int64; `features` (n, d) is what images are compared by."""

    x: np.ndarray
    label: np.ndarray
    features: np.ndarray
    num_classes: int

    def __len__(self) -> int:
        return len(self.label)


_SOURCES: dict[str, Callable[[str], tuple[np.ndarray, np.ndarray, np.ndarray, int]]] = {"digits": digits.load}


def open_images(name: str, split: Literal["train", "heldout"] = "train") -> Images:
    """The images called `name`; "heldout" are those that training never sees."""
    return Images(*_SOURCES[name](split))
