"""Group attention (arXiv 2512.10954): self-attention over all patches of all images of a group."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def group_attention(q: Tensor, k: Tensor, v: Tensor, group_size: int = 1, grouped: int | None = None) -> Tensor:
    """Attention of queries, keys and values (B, L, heads, head width), shared by groups of `group_size` images: out
    comes the same shape.

    The images of a group are contiguous, so regrouping is a view, (B, L, ...) -> (B / N, N * L, ...), and copies
    nothing. Only the first `grouped` images (whole groups; None: all) share: the others attend to themselves alone and
    cost what they cost without groups.
    """
    images, tokens, heads, width = q.shape
    if group_size > 1 and grouped is not None and grouped < images:
        shared = group_attention(q[:grouped], k[:grouped], v[:grouped], group_size)
        alone = group_attention(q[grouped:], k[grouped:], v[grouped:])
        return torch.cat([shared, alone])
    regrouped = (images // group_size, group_size * tokens, heads, width)
    q, k, v = (part.view(regrouped).transpose(1, 2) for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(images, tokens, heads, width)


class GroupAttention(nn.Module):
    """Self-attention shared by the images of a group; with groups of one it is DiT's plain attention.

    Input and output are (B, L, width), B = groups * group_size, the images of a group contiguous. Every patch attends
    to every patch of its group, in both directions; the order of images in a group matters only through what was added
    to them before.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, group_size: int = 1, grouped: int | None = None) -> Tensor:
        images, tokens, width = x.shape
        qkv = self.qkv(x).view(images, tokens, 3, self.heads, width // self.heads)
        out = group_attention(*qkv.unbind(2), group_size, grouped)
        return self.proj(out.reshape(images, tokens, width))
