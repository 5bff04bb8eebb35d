"""JiT's network as its code (github.com/LTH14/JiT) builds and stores it: convolutions, heads before tokens, tables of
RoPE, `net.` before all names. Small and random."""

import torch
from torch import nn

from tests.published import CHANNELS, CLASSES, positions


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


class Rope:
    """Pairs of neighbours turn by the row in the first half of a head, by the column in the second; `context` first
    tokens do not."""

    def __init__(self, head: int, cells: int, context: int) -> None:
        rate = 1.0 / 10000 ** (torch.arange(0, head // 2, 2).float() / (head // 2))
        angle = (torch.arange(cells).float()[:, None] * rate).repeat_interleave(2, dim=1)
        both = torch.cat(
            [angle[:, None].expand(cells, cells, -1), angle[None].expand(cells, cells, -1)], dim=-1
        ).flatten(0, 1)
        self.cos = torch.cat([torch.ones(context, head), both.cos()])
        self.sin = torch.cat([torch.zeros(context, head), both.sin()])

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        even, odd = x[..., 0::2], x[..., 1::2]
        return x * self.cos + torch.stack([-odd, even], dim=-1).flatten(-2) * self.sin


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_norm, self.k_norm = RMSNorm(width // heads), RMSNorm(width // heads)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor, rope: Rope) -> torch.Tensor:
        b, n, width = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = rope(self.q_norm(q)), rope(self.k_norm(k))
        weights = (q @ k.transpose(-2, -1) / (width // self.heads) ** 0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, width))


class SwiGLU(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w12, self.w3 = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(gate * gate.sigmoid() * value)


def scaled(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = RMSNorm(width), Attention(width, heads), RMSNorm(width)
        self.mlp = SwiGLU(width, hidden)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: torch.Tensor, c: torch.Tensor, rope: Rope) -> torch.Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, dim=-1)
        x = x + gate_a.unsqueeze(1) * self.attn(scaled(self.norm1(x), shift_a, scale_a), rope)
        return x + gate_m.unsqueeze(1) * self.mlp(scaled(self.norm2(x), shift_m, scale_m))


class Final(nn.Module):
    def __init__(self, width: int, numbers: int) -> None:
        super().__init__()
        self.norm_final, self.linear = RMSNorm(width), nn.Linear(width, numbers)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return self.linear(scaled(self.norm_final(x), *self.adaLN_modulation(c).chunk(2, dim=1)))


class Net(nn.Module):
    def __init__(
        self,
        depth=3,
        width=24,
        heads=3,
        bottleneck=10,
        context=4,
        start=1,
        patch=2,
        side=6,
        hidden=64,
        channels=CHANNELS,
        classes=CLASSES,
    ) -> None:
        super().__init__()
        self.patch, self.context, self.start, self.channels = patch, context, start, channels
        self.t_embedder = nn.ModuleDict(
            {"mlp": nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))}
        )
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(classes + 1, width)})
        self.x_embedder = nn.ModuleDict(
            {
                "proj1": nn.Conv2d(channels, bottleneck, patch, stride=patch, bias=False),
                "proj2": nn.Conv2d(bottleneck, width, 1),
            }
        )
        self.pos_embed = nn.Parameter(positions(width, side // patch), requires_grad=False)
        if context:
            self.in_context_posemb = nn.Parameter(torch.zeros(1, context, width))
        self.ropes = [Rope(width // heads, side // patch, number) for number in (0, context)]
        self.blocks = nn.ModuleList(Block(width, heads, hidden) for _ in range(depth))
        self.final_layer = Final(width, patch * patch * channels)

    def forward(self, x: torch.Tensor, t: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        angles = t[:, None] * torch.exp(-torch.log(torch.tensor(10000.0)) * torch.arange(128) / 128)
        y = self.y_embedder["embedding_table"](label)
        c = self.t_embedder["mlp"](torch.cat([angles.cos(), angles.sin()], dim=-1)) + y
        x = self.x_embedder["proj2"](self.x_embedder["proj1"](x)).flatten(2).transpose(1, 2) + self.pos_embed
        cells = round(x.shape[1] ** 0.5)
        for number, block in enumerate(self.blocks):
            if self.context and number == self.start:
                x = torch.cat([y.unsqueeze(1).repeat(1, self.context, 1) + self.in_context_posemb, x], dim=1)
            x = block(x, c, self.ropes[number >= self.start])
        x = self.final_layer(x[:, self.context :], c)
        x = x.reshape(len(x), cells, cells, self.patch, self.patch, self.channels)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(len(x), self.channels, cells * self.patch, -1)


class Denoiser(nn.Module):
    """What is stored: the network is `net`."""

    def __init__(self, **changes) -> None:
        super().__init__()
        self.net = Net(**changes)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.net(*inputs)


def make_jit(seed: int, random_weights, **changes) -> tuple[Denoiser, dict[str, torch.Tensor]]:
    """A network with random weights, those of its norms around 1, and these as its files name them."""
    network = Denoiser(**changes)
    table = network.net.pos_embed.data.clone()
    random_weights(network, seed).net.pos_embed.data.copy_(table)
    for norm in (module for module in network.modules() if isinstance(module, RMSNorm)):
        norm.weight.data += 1
    return network.requires_grad_(False), {name: tensor.clone() for name, tensor in network.state_dict().items()}
