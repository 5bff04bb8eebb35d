"""The network of the published codes (DiT, SiT, REPA, GroupDiff), built as they are: convolution, timm's attention,
stored positions, einsum. Small and random."""

import math

import numpy as np
import torch
from torch import nn

CHANNELS, CLASSES, SLOTS = 3, 5, 4
SIDE = 6  # with patches of 2: 9 tokens
FREQUENCIES = 256


def positions(width: int, cells: int) -> torch.Tensor:
    """The sin-cos table (1, cells^2, width): the first half of the width is of the column."""
    column, row = np.meshgrid(np.arange(cells, dtype=np.float32), np.arange(cells, dtype=np.float32))
    omega = 1.0 / 10000 ** (np.arange(width // 4, dtype=np.float64) / (width / 4))
    parts = []
    for axis in (column, row):
        angles = np.outer(axis.reshape(-1), omega)
        parts += [np.sin(angles), np.cos(angles)]
    return torch.from_numpy(np.concatenate(parts, axis=1)).float()[None]


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, width = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) / math.sqrt(width // self.heads)).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, width))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.attn = Attention(width, heads)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: torch.Tensor, c: torch.Tensor, group: int) -> torch.Tensor:
        b, n, width = x.shape
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, dim=1)
        h = modulate(x, shift_a, scale_a).reshape(b // group, group * n, width)
        x = x + gate_a.unsqueeze(1) * self.attn(h).reshape(b, n, width)
        h = nn.functional.gelu(self.mlp["fc1"](modulate(x, shift_m, scale_m)), approximate="tanh")
        return x + gate_m.unsqueeze(1) * self.mlp["fc2"](h)


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    x = nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6)
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Denoiser(nn.Module):
    """x (B, C, H, W), t (B,), y (B,) (CLASSES: no class), slot (B,) -> prediction. `sigma`: twice the channels;
    `drop`: of which only the first half is given; `slots`: rows of a sample embedding; `z`: width of a projector."""

    def __init__(
        self,
        sigma=False,
        drop=False,
        slots=0,
        z=0,
        width=24,
        heads=3,
        depth=2,
        patch=2,
        hidden=96,
        classes=CLASSES,
        channels=CHANNELS,
        side=SIDE,
    ) -> None:
        super().__init__()
        self.drop, self.patch, self.channels = drop, patch, channels
        self.out = channels * (2 if sigma else 1)
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(channels, width, patch, stride=patch)})
        mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.t_embedder = nn.ModuleDict({"mlp": mlp})
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(classes + 1, width)})
        if slots:
            self.sample_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(slots, width)})
        self.pos_embed = nn.Parameter(positions(width, side // patch), requires_grad=False)
        self.blocks = nn.ModuleList([Block(width, heads, hidden) for _ in range(depth)])
        if z:
            self.projectors = nn.ModuleList([nn.Sequential(nn.Linear(width, 2 * z), nn.SiLU(), nn.Linear(2 * z, z))])
        self.final_layer = nn.ModuleDict(
            {
                "linear": nn.Linear(width, patch * patch * self.out),
                "adaLN_modulation": nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width)),
            }
        )

    def forward(self, x, t, y, slot=None, group: int = 1) -> torch.Tensor:
        half = FREQUENCIES // 2
        rates = torch.exp(-math.log(10000) * torch.arange(0, half, dtype=torch.float32) / half)
        angles = t[:, None].float() * rates[None]
        c = self.t_embedder["mlp"](torch.cat([angles.cos(), angles.sin()], dim=-1).to(x.dtype))
        c = c + self.y_embedder["embedding_table"](y)
        if hasattr(self, "sample_embedder"):
            c = c + self.sample_embedder["embedding_table"](slot)
        x = self.x_embedder["proj"](x).flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.blocks:
            x = block(x, c, group)
        shift, scale = self.final_layer["adaLN_modulation"](c).chunk(2, dim=1)
        x = self.final_layer["linear"](modulate(x, shift, scale))
        cells = math.isqrt(x.shape[1])
        x = x.reshape(len(x), cells, cells, self.patch, self.patch, self.out)
        x = torch.einsum("nhwpqc->nchpwq", x).reshape(len(x), self.out, cells * self.patch, cells * self.patch)
        return x.chunk(2, dim=1)[0] if self.drop else x


NETWORKS = {
    "dit": {"sigma": True},
    "dit of the noise alone": {},
    "sit": {"sigma": True, "drop": True},
    "sit of one half": {},
    "repa": {"z": 7},
    "repa without projectors": {},
    "groupdiff dit": {"sigma": True, "slots": SLOTS},
    "groupdiff sit": {"slots": SLOTS},
}
"""What each of the published networks is; the first word is its format."""


def make(name: str, seed: int, random_weights, **changes) -> tuple[Denoiser, dict[str, torch.Tensor]]:
    """A network with random weights, and these as its files name them. What is never trained is 0 there."""
    network = Denoiser(**NETWORKS[name], **changes)
    table = network.pos_embed.data.clone()
    random_weights(network, seed).pos_embed.data.copy_(table)
    if network.drop:
        for part in network.final_layer["linear"].parameters():
            part.data.unflatten(0, (network.patch**2, 2, network.channels))[:, 1] = 0
    prefix = "denoiser." if name.startswith("groupdiff") else ""
    return network.requires_grad_(False), {prefix + key: tensor.clone() for key, tensor in network.state_dict().items()}
