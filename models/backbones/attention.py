"""Group attention (arXiv 2512.10954), self-attention over all patches of all images in a group, and its kinds."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbones.dropout import dropped


class Groups(NamedTuple):
    """Which of B images share attention: each run of `size` images among the first `grouped` (whole groups; None: all
    B); the others attend only to themselves."""

    size: int = 1
    grouped: int | None = None


Attention = Callable[[Tensor, Tensor, Tensor, Groups], Tensor]
"""attention(q, k, v, groups): map queries, keys and values (B, L, heads, head width) to an output of that shape."""


def softmax(q: Tensor, k: Tensor, v: Tensor, groups: Groups) -> Tensor:
    """Return softmax attention, scaled by 1 / sqrt(head width).

    The images of a group are contiguous, so regrouping is a view, (B, L, ...) -> (B / N, N * L, ...), and copies
    nothing. Images that do not share attention cost the same as without groups.
    """
    size, grouped = groups
    images, tokens, heads, width = q.shape
    if size > 1 and grouped is not None and grouped < images:
        shared = softmax(q[:grouped], k[:grouped], v[:grouped], Groups(size))
        alone = softmax(q[grouped:], k[grouped:], v[grouped:], Groups())
        return torch.cat([shared, alone])
    q, k, v = (regrouped(part, size) for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(images, tokens, heads, width)


ATTENTION: dict[str, Attention] = {"softmax": softmax}


def regrouped(part: Tensor, size: int) -> Tensor:
    """Return (B, L, heads, head width) as (B / size, heads, size * L, head width), a view."""
    images, tokens, heads, width = part.shape
    return part.view(images // size, size * tokens, heads, width).transpose(1, 2)


class GroupAttention(nn.Module):
    """Self-attention shared by the images of a group; with groups of one it is DiT's plain attention.

    Input and output are (B, L, width), B = groups * group_size, the images of a group contiguous. Every patch attends
    to every patch of its group, in both directions; the order of the images in a group matters only through embeddings
    added before. `observer`, if set, receives the queries and keys of each call (attention_mass.observing). With `keys`
    of dropout (B, 2), a share `dropout` of the output is dropped.
    """

    dropout: float = 0.0
    observer: Callable[[Tensor, Tensor, Groups], None] | None = None

    def __init__(self, width: int, heads: int, kind: str = "softmax") -> None:
        super().__init__()
        self.heads, self.attend = heads, ATTENTION[kind]
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, group_size: int = 1, grouped: int | None = None, keys: Tensor | None = None) -> Tensor:
        images, tokens, width = x.shape
        q, k, v = self.qkv(x).view(images, tokens, 3, self.heads, width // self.heads).unbind(2)
        q, k = self.prepare(q, k)
        groups = Groups(group_size, grouped)
        if self.observer:
            self.observer(q, k, groups)
        out = self.proj(self.attend(q, k, v, groups).reshape(images, tokens, width))
        return out if keys is None else dropped(out, self.dropout, keys)

    def prepare(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Return the queries and keys (B, L, heads, head width) to attend with; here, unchanged."""
        return q, k
