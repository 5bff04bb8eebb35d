"""The DiT backbone (Peebles & Xie, arXiv 2212.09748) with group attention; SiT uses the same network."""

from pydantic import BaseModel, Field, model_validator
from torch import Tensor, nn

from models.attention import GroupAttention
from models.embeddings import LabelEmbedder, PatchEmbedder, SampleEmbedder, TimestepEmbedder, sincos_positions

SIZES = {  # depth, width, heads (DiT, table 1)
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}


class ModelConfig(BaseModel, extra="forbid", frozen=True):
    """The network. `size` fills depth, width and heads; leave it out to choose them freely."""

    size: str | None = None
    depth: int = Field(12, ge=1)
    width: int = Field(384, ge=4)
    heads: int = Field(6, ge=1)
    patch: int = Field(2, ge=1)
    mlp_ratio: float = Field(4.0, gt=0)
    max_group_size: int = Field(16, ge=1)  # rows of the sample embedding
    time_scale: float = Field(1.0, gt=0)  # t in [0, 1] is multiplied by it: SiT has 1, DiT 1000

    @model_validator(mode="before")
    @classmethod
    def _fill_size(cls, values: dict) -> dict:
        size = values.get("size") if isinstance(values, dict) else None
        if not isinstance(size, str):
            return values
        if size not in SIZES:
            raise ValueError(f"size={size}: no such size; choose of {', '.join(SIZES)}, or give depth, width, heads")
        filled = dict(zip(("depth", "width", "heads"), SIZES[size], strict=True))
        for name, value in filled.items():
            if values.get(name, value) != value:
                raise ValueError(f"{name}={values[name]}: contradicts size={size} ({name} {value}); set size=null")
        return {**values, **filled}

    @model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        if self.width % self.heads or self.width % 4:
            raise ValueError(f"width={self.width}: must be a multiple of heads={self.heads} and of 4")
        return self


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN: x (B, L, width) scaled and shifted per image by (B, width)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class Mlp(nn.Module):
    """Two layers with a tanh-GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class DiTBlock(nn.Module):
    """adaLN-Zero block: x (B, L, width), conditioning c (B, width). Only the attention sees the group."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = GroupAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor, group_size: int) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_a[:, None] * self.attn(modulate(self.norm1(x), shift_a, scale_a), group_size)
        return x + gate_m[:, None] * self.mlp(modulate(self.norm2(x), shift_m, scale_m))


class FinalLayer(nn.Module):
    """Tokens (B, L, width) -> patches (B, L, patch * patch * channels)."""

    def __init__(self, width: int, patch: int, channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, patch * patch * channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiT(nn.Module):
    """Diffusion transformer for images (channels, side, side) of `num_classes` classes."""

    def __init__(self, config: ModelConfig, channels: int, side: int, num_classes: int) -> None:
        super().__init__()
        if side % config.patch:
            raise ValueError(f"model.patch={config.patch}: must divide the image side {side}")
        self.patch, self.channels, self.time_scale = config.patch, channels, config.time_scale
        self.x_embedder = PatchEmbedder(config.patch, channels, config.width)
        self.t_embedder = TimestepEmbedder(config.width)
        self.y_embedder = LabelEmbedder(num_classes, config.width)
        self.sample_embedder = SampleEmbedder(config.max_group_size, config.width)
        positions = sincos_positions(config.width, side // config.patch)
        self.register_buffer("pos_embed", positions, persistent=False)
        blocks = [DiTBlock(config.width, config.heads, config.mlp_ratio) for _ in range(config.depth)]
        self.blocks = nn.ModuleList(blocks)
        self.final_layer = FinalLayer(config.width, config.patch, channels)
        self._initialise()

    def _initialise(self) -> None:
        """As DiT: Xavier-uniform layers, N(0, 0.02) embeddings, adaLN-Zero: every block starts as the identity."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for layer in (self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
        modulations = [layer.adaLN_modulation[1] for layer in (*self.blocks, self.final_layer)]
        for layer in (*modulations, self.final_layer.linear):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, t: Tensor, label: Tensor, slot: Tensor, group_size: int = 1) -> Tensor:
        """Noisy images x (B, C, H, W), time t (B,) in [0, 1], label (B,) (NULL_LABEL: unconditional), slot (B,) ->
        prediction (B, C, H, W). B is a multiple of `group_size`; the images of a group are contiguous."""
        c = self.t_embedder(self.time_scale * t) + self.y_embedder(label) + self.sample_embedder(slot)
        tokens = self.x_embedder(x)
        tokens = tokens + self.pos_embed.to(tokens.dtype)
        for block in self.blocks:
            tokens = block(tokens, c, group_size)
        return self._unpatchify(self.final_layer(tokens, c), x.shape[-1] // self.patch)

    def _unpatchify(self, patches: Tensor, side: int) -> Tensor:
        images = patches.view(-1, side, side, self.patch, self.patch, self.channels)
        pixels = side * self.patch
        return images.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.channels, pixels, pixels)
