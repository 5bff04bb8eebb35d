"""Embeddings of patches, positions, time, class and slot in the group. Names are those of DiT."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from models.backbones.precision import in_fp32

NULL_LABEL = -1
"""The label of an unconditional image, whatever the number of classes."""


def sincos_positions(width: int, side: int) -> Tensor:
    """Return the 2-D sin-cos position embedding (side * side, width); as in DiT, the first half encodes the column."""
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, width / 2)
    column = axis[None, :, :].expand(side, side, -1)
    row = axis[:, None, :].expand(side, side, -1)
    return torch.cat([column, row], dim=-1).reshape(side * side, width).float()


class PatchEmbedder(nn.Module):
    """Image (B, C, H, W) -> tokens (B, L, width), L = (H / patch)^2, row by row: DiT's convolution, as a matrix."""

    def __init__(self, patch: int, channels: int, width: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Linear(channels * patch * patch, width)

    def forward(self, x: Tensor) -> Tensor:
        images, channels, side, _ = x.shape
        cells = side // self.patch
        x = x.to(self.proj.weight.dtype).reshape(images, channels, cells, self.patch, cells, self.patch)
        return self.proj(x.permute(0, 2, 4, 1, 3, 5).reshape(images, cells * cells, -1))


class TimestepEmbedder(nn.Module):
    """Time (B,) in the network's own units (DiT: 0..1000; SiT: 0..1) -> (B, width), in fp32: in bf16, neighbouring
    timesteps would coincide."""

    def __init__(self, width: int, frequencies: int = 256) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        half = self.frequencies // 2
        rates = torch.exp(-math.log(10000) / half * torch.arange(half, dtype=torch.float32, device=t.device))
        angles = t.float()[:, None] * rates
        first: Any = self.mlp[0]
        with in_fp32(t.device):
            return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1).to(first.weight.dtype))


class LabelEmbedder(nn.Module):
    """Class number (B,) -> (B, width); NULL_LABEL takes the last row, which means "unconditional"."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, label: Tensor) -> Tensor:
        return self.embedding_table(label.masked_fill(label == NULL_LABEL, self.num_classes))


class SampleEmbedder(nn.Module):
    """Slot (B,) -> (B, width): which image of its group this is (Group Diffusion's "sample embedding")."""

    def __init__(self, slots: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(slots, width)

    def forward(self, slot: Tensor) -> Tensor:
        return self.embedding_table(slot)
