"""Whether published weights fit our networks, and what their positions tell."""

import math
import re
from typing import Any

import torch
from torch import Tensor

from models.backbones.base import Backbone, BackboneConfig
from models.backbones.embeddings import sincos_positions
from models.backbones.sample_embedding import CLASSES, Weights
from models.paths.base import PathConfig

POSITIONS = "pos_embed"
ROUNDING = 1e-2  # allows for half precision (2e-3) or a running average (2e-4) of the positions, which are at most 1


def check_fit(
    weights: Weights, backbone: type[Backbone], config: Any, channels: int, predictions: int, kind: str
) -> None:
    """Raise ValueError with the name of the first tensor that does not fit our network."""
    with torch.device("meta"):
        network = backbone(config, channels, config.patch, rows(weights, CLASSES) - 1, predictions * channels)
    expected = network.state_dict()
    for name in expected | weights:
        if name not in weights:
            raise ValueError(f"{name} is missing in these weights of {kind}")
        if name not in expected:
            raise ValueError(f"{name} is unexpected in weights of {kind}")
        if (found := tuple(weights[name].shape)) != (wanted := tuple(expected[name].shape)):
            raise ValueError(f"{name} is {found}, must be {wanted} beside the others of these weights of {kind}")


def check_plain(theirs: str, path: PathConfig, config: BackboneConfig, wanted: dict[str, object]) -> None:
    """Raise ValueError if a network is none of another code's class `theirs`, which has no groups and these values of
    path.name and model.*."""
    found = {"path": path.name, "model.max_group_size": config.slots}
    for name, value in (wanted | {"model.max_group_size": min(config.slots, 1)}).items():
        own = found[name] if name in found else getattr(config, name.removeprefix("model."))
        if own != value:
            raise ValueError(f"{name}={own}: {theirs} is for {value} alone; use the .safetensors file instead")


def cells_of(positions: Tensor, width: int) -> int:
    """Return the number of patches along a side of the image. Raise ValueError unless the positions are DiT's for a
    square."""
    cells = math.isqrt(positions.numel() // width)
    ours = sincos_positions(width, cells)
    fits = cells > 0 and positions.numel() == ours.numel()
    if not (fits and (positions.reshape(ours.shape) - ours).abs().max() <= ROUNDING):
        shape = tuple(positions.shape)
        raise ValueError(f"{POSITIONS} {shape} is not DiT's of {cells} x {cells} patches: of another resolution")
    return cells


def blocks_of(weights: Weights) -> set[str]:
    """Return the numbers of the blocks."""
    return {found[1] for name in weights if (found := re.match(r"blocks\.(\d+)\.", name))}


def rows(weights: Weights, name: str) -> int:
    """Return the length of a tensor; 1 if it is missing or a number."""
    return max(len(weights[name]), 1) if name in weights and weights[name].dim() else 1


def with_size(model: dict, sizes: dict[str, dict]) -> dict:
    """Return the fields of a network's config with the published size that sets some of them to what they are."""
    for size, values in sizes.items():
        if all(model.get(name, value) == value for name, value in values.items()) and values["depth"] == model["depth"]:
            return {"size": size} | {name: value for name, value in model.items() if name not in values}
    return model
