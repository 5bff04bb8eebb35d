"""The network that a config asks for."""

from torch import nn

from models.backbones.config import ModelConfig
from models.backbones.dit import DiT
from models.backbones.jit import JiT


def make_network(config: ModelConfig, channels: int, side: int, num_classes: int, out_channels: int) -> nn.Module:
    """network(x, t, label, slot, group_size, grouped) -> prediction (B, out_channels, side, side), freshly initialised.

    x (B, channels, side, side) in groups of `group_size` images, each contiguous; the first `grouped` images share
    attention in their groups (None: all), the others attend to themselves. t, label (NULL_LABEL: unconditional) and
    slot are (B,).
    """
    backbone = {"dit": DiT, "jit": JiT}[config.backbone]
    return backbone(config, channels, side, num_classes, out_channels)
