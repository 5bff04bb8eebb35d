"""Further fields of a store of images: each can be asked for by a loss term.

How a field goes with mirror images is declared in the store's settings, {"mirror": {NAME: HOW}}:
both   its first axis, of length 2, has the values of the image and of its mirror image, as latents do
width  its last axis is the width of the image, and is reversed
Without a declaration the mirror image has the same values.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from data.errors import DataError

HOW = ("both", "width")


class Field(NamedTuple):
    """The shape that a field has for an image as training reads it, and how it goes with mirror images."""

    shape: tuple[int, ...]
    mirror: str | None


def extra_fields(folder: str, manifest: dict, main: str) -> dict[str, Field]:
    """Return the fields of a store beside its `main` one. Raise DataError if one is not as its declaration says."""
    declared = manifest["settings"].get("mirror", {})
    found = {}
    for name in manifest["fields"].keys() - {main}:
        shape, mirror = tuple(manifest["fields"][name]["shape"]), declared.get(name)
        if mirror is not None and mirror not in HOW:
            raise DataError(f"{folder}: its settings have mirror={mirror} for {name}; make it with {' or '.join(HOW)}")
        if (mirror == "both" and shape[:1] != (2,)) or (mirror == "width" and not shape):
            raise DataError(f"{folder}: its settings have mirror={mirror} for {name}, which is {shape} an image")
        found[name] = Field(shape[1:] if mirror == "both" else shape, mirror)
    return found


def read_field(field: Field, read: Callable[[np.ndarray | None], np.ndarray], flip: np.ndarray | None) -> torch.Tensor:
    """Return a field of b images, as stored, and of the mirror image where `flip` (b,) says so. `read` returns it, and
    if given an entry (b,), that of its first axis."""
    if field.mirror == "both":
        return torch.from_numpy(read(flip))
    values = read(None)
    if field.mirror == "width" and flip is not None:
        values[flip] = values[flip][..., ::-1]
    return torch.from_numpy(values)
