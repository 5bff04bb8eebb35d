"""Extra fields of a store of images, which loss terms may ask for.

The store's settings, {"mirror": {NAME: HOW}}, declare the values that a field has for a mirror image:
both   the first axis, of length 2, holds the values of the image and of its mirror image, as for latents
width  the last axis is the width of the image, and is reversed
Without a declaration, the mirror image has the same values.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from data.errors import DataError

HOW = ("both", "width")


class Field(NamedTuple):
    """The shape of a field for one image as training reads it, and how it is mirrored."""

    shape: tuple[int, ...]
    mirror: str | None


def extra_fields(folder: str, manifest: dict, main: str) -> dict[str, Field]:
    """Return the fields of a store other than `main`. Raise DataError if one does not match its declaration."""
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
    """Return a field of b images as stored, or of the mirror image where `flip` (b,) is true. `read` returns the
    field, or, given an entry (b,), that entry of its first axis."""
    if field.mirror == "both":
        return torch.from_numpy(read(flip))
    values = read(None)
    if field.mirror == "width" and flip is not None:
        values[flip] = values[flip][..., ::-1]
    return torch.from_numpy(values)
