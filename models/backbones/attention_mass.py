"""How the attention of a group is spread over its images: Group Diffusion's cross-sample attention score (arXiv
2512.10954), and the share of attention that leaves an image.

All tokens of an image count as that image: with JiT, its class tokens too.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from models.backbones.attention import GroupAttention, Groups, regrouped
from models.backbones.precision import in_fp32

BLOCK = 2**22  # most elements of attention matrices in memory at a time


@contextmanager
def observing(network: nn.Module, see: Callable[[int, Tensor, Tensor], None]) -> Iterator[None]:
    """While the context is open, call `see(layer, q, k)` for each attention layer of a network, counted from 0, with
    the queries and keys (groups, heads, N * L, head width) that it is computed from; if not all images share attention,
    with those of the images that do. The network may be wrapped in DDP, FSDP or DeepSpeed, and computes as usual, but
    without torch.compile. Raise ValueError if it has no GroupAttention."""
    layers = [module for module in network.modules() if isinstance(module, GroupAttention)]
    if not layers:
        raise ValueError(f"{type(network).__name__}: has no GroupAttention, so there is no attention to observe")

    def observer(layer: int, q: Tensor, k: Tensor, groups: Groups) -> None:
        see(layer, *(regrouped(part[: groups.grouped] if groups.size > 1 else part, groups.size) for part in (q, k)))

    for layer, module in enumerate(layers):
        module.observer = partial(observer, layer)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module in layers:
            del module.observer


@torch.no_grad()
def attention_mass(q: Tensor, k: Tensor, group_size: int) -> Tensor:
    """Return P (groups, N, N), fp32: the attention that image i sends to image j of its group, itself included,
    averaged over heads and over the tokens of i. Rows sum to 1. q and k are (groups, heads, N * L, head width).

    Compute it in blocks of whole groups, or of rows of one group: at most BLOCK elements at a time, or one row.
    """
    heads, tokens = q.shape[1:3]
    at_once = max(BLOCK // (heads * tokens * tokens), 1)
    rows = max(BLOCK // (at_once * heads * tokens), 1)
    masses = []
    for some_q, some_k in zip(q.split(at_once), k.split(at_once), strict=True):
        blocks = [_attention(block, some_k) for block in some_q.split(rows, dim=2)]
        to_image = torch.cat([_per_image(block, group_size).sum(-1).mean(1) for block in blocks], dim=1)
        masses.append(_per_image(to_image.mT, group_size).mean(-1).mT)
    return torch.cat(masses)


@torch.no_grad()
def token_attention(q: Tensor, k: Tensor, group_size: int, token: int) -> Tensor:
    """Return the attention that one of a group's N * L tokens sends to each, averaged over heads: (groups, N, L), fp32.
    It sums to 1 for each group."""
    return _per_image(_attention(q[:, :, token : token + 1], k)[:, :, 0].mean(1), group_size)


def _attention(q: Tensor, k: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(head width)) in fp32, whatever the types."""
    with in_fp32(q.device):
        return ((q.float() * q.shape[-1] ** -0.5) @ k.float().mT).softmax(dim=-1)


def _per_image(x: Tensor, group_size: int) -> Tensor:
    """Return (..., N * L) as (..., N, L)."""
    return x.unflatten(-1, (group_size, -1))


def s_cross(mass: Tensor) -> Tensor:
    """Return S_cross = (P_max - P_mean) / P_max of each image, over the other images of its group: P (..., N, N) ->
    (..., N). 0: evenly spread, always so for N = 2, or no attention to others; at most 1 - 1 / (N - 1): all to one
    image."""
    others = _others(mass)
    most = others.amax(dim=-1)
    return (most - others.mean(dim=-1)) / most.clamp(min=torch.finfo(most.dtype).tiny)


def cross_share(mass: Tensor) -> Tensor:
    """Return the share of its attention that each image sends to others: P (..., N, N) -> (..., N). For uniform
    attention it is (N - 1) / N."""
    return _others(mass).sum(dim=-1)


def _others(mass: Tensor) -> Tensor:
    """Return P without its diagonal, (..., N, N - 1)."""
    size = mass.shape[-1]
    if size < 2:
        raise ValueError(f"group_size={size}: an image alone sends no attention to others; give groups of 2 or more")
    return mass[..., ~torch.eye(size, dtype=torch.bool, device=mass.device)].unflatten(-1, (size, size - 1))
