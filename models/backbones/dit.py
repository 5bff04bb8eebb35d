"""The DiT backbone (Peebles & Xie, arXiv 2212.09748) with group attention; SiT uses the same network."""

import math
from typing import Any

from torch import Tensor, nn

from models.backbones.attention import GroupAttention
from models.backbones.base import Backbone, BackboneConfig
from models.backbones.embeddings import LabelEmbedder, PatchEmbedder, SampleEmbedder, TimestepEmbedder, sincos_positions
from models.backbones.mlp import MLPS
from models.backbones.precision import in_fp32


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return x (B, L, width) scaled and shifted per image by (B, width): adaLN."""
    return x * (1 + scale[:, None]) + shift[:, None]


class DiTBlock(nn.Module):
    """adaLN-Zero block: x (B, L, width), conditioning c (B, width). Only the attention sees the group. `keys`, if any,
    are those of the dropout of attention and MLP."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        width = config.width
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = GroupAttention(width, config.heads, config.attention)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = MLPS[config.mlp](width, int(width * config.mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor, group_size: int, grouped: int | None = None, *keys: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_a[:, None] * self.attn(modulate(self.norm1(x), shift_a, scale_a), group_size, grouped, *keys[:1])
        return x + gate_m[:, None] * self.mlp(modulate(self.norm2(x), shift_m, scale_m), *keys[1:])


class FinalLayer(nn.Module):
    """Tokens (B, L, width) -> patches (B, L, patch * patch * channels), in fp32."""

    def __init__(self, width: int, patch: int, channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, patch * patch * channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        with in_fp32(x.device):
            shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
            return self.linear(modulate(self.norm_final(x), shift, scale))


class DiT(Backbone):
    """Diffusion transformer for images (channels, side, side) of `num_classes` classes. It predicts `out_channels`,
    twice `channels` if it also learns a variance."""

    class Config(BackboneConfig, frozen=True):
        """The network. `size` sets depth, width and heads; leave it out to set them yourself."""

        sizes = {  # table 1 of arXiv 2212.09748
            "S": {"depth": 12, "width": 384, "heads": 6},
            "B": {"depth": 12, "width": 768, "heads": 12},
            "L": {"depth": 24, "width": 1024, "heads": 16},
            "XL": {"depth": 28, "width": 1152, "heads": 16},
        }

    def __init__(
        self, config: Config, channels: int, side: int, num_classes: int, out_channels: int | None = None
    ) -> None:
        super().__init__(config, channels, side, num_classes, out_channels)
        self.x_embedder = PatchEmbedder(config.patch, channels, config.width)
        self.t_embedder = TimestepEmbedder(config.width)
        self.y_embedder = LabelEmbedder(num_classes, config.width)
        self.sample_embedder = SampleEmbedder(config.slots, config.width) if config.slots else None
        positions = sincos_positions(config.width, side // config.patch)
        self.tokens = len(positions)
        self.register_buffer("pos_embed", positions, persistent=False)
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config.width, config.patch, self.out_channels)
        initialise(self)

    def forward(
        self, x: Tensor, t: Tensor, label: Tensor, slot: Tensor, group_size: int = 1, grouped: int | None = None
    ) -> Tensor:
        c = self.t_embedder(self.config.time_scale * t) + self.y_embedder(label)
        if self.sample_embedder:
            c = c + self.sample_embedder(slot)
        tokens = self.x_embedder(x) + self.pos_embed  # fp32, as positions are
        for layer, block in enumerate(self.blocks):
            tokens = block(tokens, c, group_size if self.config.shares(layer) else 1, grouped)
        return unpatchify(self.final_layer(tokens, c), self.config.patch)


def initialise(network: Any) -> None:
    """Initialise as in DiT: Xavier-uniform layers, N(0, 0.02) embeddings, adaLN-Zero (every block starts as the
    identity)."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    for layer in (network.t_embedder.mlp[0], network.t_embedder.mlp[2]):
        nn.init.normal_(layer.weight, std=0.02)
    modulations = [layer.adaLN_modulation[1] for layer in (*network.blocks, network.final_layer)]
    for layer in (*modulations, network.final_layer.linear):
        nn.init.zeros_(layer.weight)


def unpatchify(patches: Tensor, patch: int) -> Tensor:
    """Return square images (B, C, H, W) from their patches (B, L, patch * patch * C), row by row."""
    images, tokens, numbers = patches.shape
    cells = math.isqrt(tokens)
    pixels = patches.view(images, cells, cells, patch, patch, numbers // patch**2).permute(0, 5, 1, 3, 2, 4)
    return pixels.reshape(images, -1, cells * patch, cells * patch)
