"""The JiT backbone (Li & He, "Back to Basics: Let Denoising Generative Models Denoise", arXiv 2511.13720) with group
attention: a plain transformer on large patches of pixels."""

from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from models.backbones.attention import GroupAttention
from models.backbones.base import Backbone, BackboneConfig
from models.backbones.dit import DiTBlock, FinalLayer, initialise, unpatchify
from models.backbones.dropout import layer_keys
from models.backbones.embeddings import LabelEmbedder, SampleEmbedder, TimestepEmbedder, sincos_positions
from models.backbones.mlp import MLPS
from models.backbones.precision import at_least_fp32
from models.choice import NameOf


def rotations(head_width: int, side: int, context: int = 0) -> Tensor:
    """Return the 2-D RoPE (Su et al., arXiv 2104.09864) of side * side patches, row by row: cosines and sines
    (2, context + L, 1, head_width / 2), in fp32. The first half of a head rotates by the patch's row, the second by its
    column. `context` tokens come first and are not rotated."""
    frequencies = 10000.0 ** -(torch.arange(head_width // 4, dtype=torch.float64) / (head_width // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    row = angles[:, None, :].expand(side, side, -1)
    column = angles[None, :, :].expand(side, side, -1)
    angles = torch.cat([row, column], dim=-1).reshape(side * side, 1, head_width // 2)
    angles = F.pad(angles, (0, 0, 0, 0, context, 0))
    return torch.stack([angles.cos(), angles.sin()]).float()


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate each pair of adjacent numbers of x (B, L, heads, head width) by the angle of its token, in fp32."""
    cos, sin = rotation
    first, second = at_least_fp32(x).unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.flatten(-2).to(x.dtype)


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight over the last dimension, in fp32 whatever the types of x and of the weight."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        wide, weight = at_least_fp32(x), at_least_fp32(self.weight)
        return F.rms_norm(wide, self.normalized_shape, weight, self.eps).to(x.dtype)


class BottleneckPatchEmbedder(nn.Module):
    """Image (B, C, H, W) -> tokens (B, L, width), L = (H / patch)^2, row by row, through a layer of width
    `bottleneck`."""

    def __init__(self, patch: int, channels: int, bottleneck: int, width: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj1 = nn.Linear(channels * patch * patch, bottleneck, bias=False)
        self.proj2 = nn.Linear(bottleneck, width)

    def forward(self, x: Tensor) -> Tensor:
        patches = F.pixel_unshuffle(x.to(self.proj1.weight.dtype), self.patch).flatten(2)
        return self.proj2(self.proj1(patches.transpose(1, 2).contiguous()))


class RotaryAttention(GroupAttention):
    """Group attention with qk-norm (Henry et al., arXiv 2010.04245) and 2-D RoPE. Positions restart in each image: how
    patches of two images attend to each other depends on their positions in their own images, not on the images'
    order."""

    rotation: Tensor

    def __init__(self, width: int, heads: int, rotation: Tensor, kind: str = "softmax") -> None:
        super().__init__(width, heads, kind)
        self.q_norm = RMSNorm(width // heads)
        self.k_norm = RMSNorm(width // heads)
        self.register_buffer("rotation", rotation, persistent=False)

    def prepare(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Return the queries and keys normalised and rotated: in fp32, and rounded once."""
        normed = self.q_norm(at_least_fp32(q)), self.k_norm(at_least_fp32(k))
        turned = rotate(normed[0], self.rotation), rotate(normed[1], self.rotation)
        return turned[0].to(q.dtype), turned[1].to(k.dtype)


class JiTBlock(nn.Module):
    """A DiT block with RMSNorm and rotary attention."""

    def __init__(self, config: BackboneConfig, rotation: Tensor, dropout: float) -> None:
        super().__init__()
        width = config.width
        self.norm1 = RMSNorm(width)
        self.attn = RotaryAttention(width, config.heads, rotation, config.attention)
        self.norm2 = RMSNorm(width)
        self.mlp: Any = MLPS[config.mlp](width, int(width * config.mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        if dropout:
            self.attn.dropout = self.mlp.dropout = dropout

    forward = DiTBlock.forward


class JiT(Backbone):
    """Just-image transformer for images (channels, side, side) of `num_classes` classes; predicts `out_channels`.

    Before block `context_start`, `context_tokens` class tokens are prepended to the patches of each image; they take
    part in its group's attention and are dropped before the last layer. With `dropout` and the `keys` of its images, as
    in training, the middle half of the blocks drops a share of what attention gives and of the MLP's hidden numbers.
    Names are those of the public code, whose convolutions `x_embedder.proj1` and `proj2` are matrices here and whose
    `in_context_posemb` has a leading dimension of 1.
    """

    class Config(BackboneConfig, frozen=True):
        """The network. `size` sets depth, width, heads and the like; leave it out to set them yourself."""

        sizes = {  # table 9 of arXiv 2511.13720
            "B": {"depth": 12, "width": 768, "heads": 12, "bottleneck": 128, "context_start": 4},
            "L": {"depth": 24, "width": 1024, "heads": 16, "bottleneck": 128, "context_start": 8},
            "H": {"depth": 32, "width": 1280, "heads": 16, "bottleneck": 256, "context_start": 10},
            "G": {"depth": 40, "width": 1664, "heads": 16, "bottleneck": 256, "context_start": 10},
        }

        backbone: str = "jit"
        """The network's architecture."""
        mlp: Annotated[str, NameOf(MLPS)] = "swiglu"
        """The MLP of a block."""
        bottleneck: int = Field(128, ge=1)
        """Width between the two layers that embed a patch."""
        context_tokens: int = Field(32, ge=0)
        """Number of tokens that carry the class."""
        context_start: int = Field(4, ge=0)
        """The block, counted from 0, before which the class tokens are added."""
        dropout: float = Field(0.0, ge=0, lt=1)
        """Share of numbers that the middle half of the blocks drops in training: of what attention gives, and of the
        MLP's hidden layer. Published: 0.2 for sizes H and G, 0 for B and L."""

        @model_validator(mode="after")
        def _check_jit(self) -> "JiT.Config":
            if self.width // self.heads % 4:
                raise ValueError(f"heads={self.heads}: width / heads must be a multiple of 4 for backbone=jit")
            if self.context_start >= self.depth:
                raise ValueError(f"context_start={self.context_start}: must be less than depth={self.depth}")
            if self.dropout and self.depth < 4:
                raise ValueError(f"dropout={self.dropout}: depth={self.depth} has no middle half; set 4 or more blocks")
            if self.dropout and not hasattr(MLPS[self.mlp], "dropout"):
                raise ValueError(f"dropout={self.dropout}: mlp={self.mlp} has none; set mlp=swiglu, or dropout=0")
            return self

        def drops(self, layer: int) -> bool:
            """Return whether a block has dropout: those of the middle half."""
            quarter = self.depth // 4
            return self.dropout > 0 and quarter <= layer < 3 * quarter

    config: Config

    def __init__(
        self, config: Config, channels: int, side: int, num_classes: int, out_channels: int | None = None
    ) -> None:
        super().__init__(config, channels, side, num_classes, out_channels)
        self.takes_keys = config.dropout > 0
        self.x_embedder = BottleneckPatchEmbedder(config.patch, channels, config.bottleneck, config.width)
        self.t_embedder = TimestepEmbedder(config.width)
        self.y_embedder = LabelEmbedder(num_classes, config.width)
        self.sample_embedder = SampleEmbedder(config.slots, config.width) if config.slots else None
        cells, head_width = side // config.patch, config.width // config.heads
        with_context = 1 - config.context_start / config.depth  # share of the blocks
        self.tokens = cells**2 + config.context_tokens * with_context
        self.register_buffer("pos_embed", sincos_positions(config.width, cells), persistent=False)
        if config.context_tokens:
            self.in_context_posemb = nn.Parameter(torch.empty(config.context_tokens, config.width))
        alone, joined = rotations(head_width, cells), rotations(head_width, cells, config.context_tokens)
        self.blocks = nn.ModuleList(
            JiTBlock(config, alone if i < config.context_start else joined, config.dropout * config.drops(i))
            for i in range(config.depth)
        )
        self.final_layer = FinalLayer(config.width, config.patch, self.out_channels)
        self.final_layer.norm_final = RMSNorm(config.width)  # pyright: ignore[reportAttributeAccessIssue]
        initialise(self)
        if config.context_tokens:
            nn.init.normal_(self.in_context_posemb, std=0.02)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        label: Tensor,
        slot: Tensor,
        group_size: int = 1,
        grouped: int | None = None,
        keys: Tensor | None = None,
    ) -> Tensor:
        config, y = self.config, self.y_embedder(label)
        c = self.t_embedder(config.time_scale * t) + y
        if self.sample_embedder:
            c = c + self.sample_embedder(slot)
        tokens = self.x_embedder(x) + self.pos_embed  # fp32, as positions are
        drops = () if keys is None else layer_keys(keys, 2 * config.depth)
        for layer, block in enumerate(self.blocks):
            if config.context_tokens and layer == config.context_start:
                tokens = torch.cat([y[:, None] + self.in_context_posemb, tokens], dim=1)
            own = drops[2 * layer : 2 * layer + 2] if config.drops(layer) else ()
            tokens = block(tokens, c, group_size if config.shares(layer) else 1, grouped, *own)
        return unpatchify(self.final_layer(tokens[:, config.context_tokens :], c), config.patch)
