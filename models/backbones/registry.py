"""The backbones, and the network that a config asks for.

To add one, write a subclass of `models.backbones.base.Backbone` with a nested `Config`, and add a line to BACKBONES.
"""

from typing import Annotated

from models.backbones.base import WRAPPERS, Backbone, BackboneConfig
from models.backbones.dit import DiT
from models.backbones.jit import JiT
from models.choice import OneOf

BACKBONES: dict[str, type[Backbone]] = {"dit": DiT, "jit": JiT}
CHOICE = OneOf(BACKBONES, "backbone", "dit")
ModelConfig = Annotated[BackboneConfig, CHOICE]
"""The section `model` of a config: the fields of the backbone that it names."""


def model_config(values: object) -> BackboneConfig:
    """Return the section `model` from plain values."""
    return CHOICE.read(values)


def make_network(
    config: BackboneConfig, channels: int, side: int, num_classes: int, out_channels: int | None = None
) -> Backbone:
    """Return the network, freshly initialised, with the config's wrappers around its blocks."""
    network = BACKBONES[config.backbone](config, channels, side, num_classes, out_channels)
    for number, block in enumerate(network.blocks):
        for name in config.wrap:
            WRAPPERS[name](block, number, config)
    return network
