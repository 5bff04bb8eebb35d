"""JiT as its code (Li & He, arXiv 2511.13720) has it, image by image, in float64 of weights by their names. Tables are
stored in fp32, and so are the angles of time."""

import math

import torch
from torch.nn import functional as F

from tests.published import positions


def turned(x):
    """2-D RoPE in float64 of patches x (side, side, heads, head width): complex numbers times exp(i * position * rate),
    the first half of a head by the row of a patch, the second by its column."""
    side, _, _, width = x.shape
    rate = 10000.0 ** (-4 * torch.arange(width // 4, dtype=torch.float64) / width)
    angle = torch.arange(side)[:, None] * rate
    phase = torch.complex(angle.cos().float().double(), angle.sin().float().double())
    by_row, by_column = (torch.view_as_complex(half.unflatten(-1, (-1, 2)).contiguous()) for half in x.chunk(2, -1))
    parts = (by_row * phase[:, None, None], by_column * phase[None, :, None])
    return torch.cat([torch.view_as_real(part).flatten(-2) for part in parts], dim=-1)


def published_jit(w, config, x, t, label, slot, group_size=1):
    """The prediction for images x at times t of classes `label` (the last row of their table: no class), given float64
    weights by name. Only the attention is group by group; there is a sample embedding if it has weights."""
    images, channels, pixels, _ = x.shape
    patch, side, width, heads = config.patch, pixels // config.patch, config.width, config.heads
    context = config.context_tokens

    def linear(name, value):
        return F.linear(value, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(name, value):
        return value / (value.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"]

    def embed(image):
        kernel = w["x_embedder.proj1.weight"].view(-1, channels, patch, patch)
        squeezed = F.conv2d(image[None], kernel, stride=patch).flatten(2)[0].T
        return linear("x_embedder.proj2", squeezed) + positions(width, side)[0]

    def position(value, skipped):
        parts = value.view(-1, heads, width // heads).split([skipped, side * side])
        return torch.cat([parts[0], turned(parts[1].unflatten(0, (side, side))).flatten(0, 1)])

    def attend(block, values, shared, skipped):
        names = [f"blocks.{block}.attn.{part}" for part in ("qkv", "q_norm", "k_norm", "proj")]
        qkv = [linear(names[0], value).view(-1, 3, heads, width // heads) for value in values]
        q = [position(norm(names[1], value[:, 0]), skipped) for value in qkv]
        k = [position(norm(names[2], value[:, 1]), skipped) for value in qkv]
        v = [value[:, 2] for value in qkv]
        out = []
        for i, own in enumerate(q):
            group = slice(i - i % group_size, i - i % group_size + group_size) if shared else slice(i, i + 1)
            scores = torch.einsum("qhd,khd->hqk", own, torch.cat(k[group])) / (width // heads) ** 0.5
            mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), torch.cat(v[group]))
            out.append(linear(names[3], mixed.flatten(1)))
        return out

    rates = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
    angles = (config.time_scale * t).float()[:, None] * rates
    angles = torch.cat([angles.cos(), angles.sin()], dim=1).double()
    c = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", angles)))
    y = w["y_embedder.embedding_table.weight"][label]
    c = c + y
    if "sample_embedder.embedding_table.weight" in w:
        c = c + w["sample_embedder.embedding_table.weight"][slot]
    c = F.silu(c)
    tokens = [embed(image) for image in x.double()]
    for i in range(config.depth):
        if context and i == config.context_start:
            tokens = [torch.cat([y[n] + w["in_context_posemb"], tokens[n]]) for n in range(images)]
        skipped = context if i >= config.context_start else 0
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = linear(f"blocks.{i}.adaLN_modulation.1", c).chunk(6, 1)
        values = [norm(f"blocks.{i}.norm1", tokens[n]) * (1 + scale_a[n]) + shift_a[n] for n in range(images)]
        shared = config.group_layers is None or i in config.group_layers
        attended = attend(i, values, shared, skipped)
        for n in range(images):
            tokens[n] = tokens[n] + gate_a[n] * attended[n]
            value = norm(f"blocks.{i}.norm2", tokens[n]) * (1 + scale_m[n]) + shift_m[n]
            gate, hidden = linear(f"blocks.{i}.mlp.w12", value).chunk(2, 1)
            tokens[n] = tokens[n] + gate_m[n] * linear(f"blocks.{i}.mlp.w3", gate * gate.sigmoid() * hidden)
    shift, scale = linear("final_layer.adaLN_modulation.1", c).chunk(2, 1)
    out = []
    for n in range(images):
        value = norm("final_layer.norm_final", tokens[n][-side * side :]) * (1 + scale[n]) + shift[n]
        patches = linear("final_layer.linear", value).view(side, side, patch, patch, channels)
        out.append(torch.einsum("hwpqc->chpwq", patches).reshape(channels, pixels, pixels))
    return torch.stack(out)
