"""Group attention (arXiv 2512.10954): self-attention over all patches of all images of a group."""

import torch.nn.functional as F
from torch import Tensor, nn


class GroupAttention(nn.Module):
    """Self-attention shared by the images of a group; with groups of one it is DiT's plain attention.

    Input and output are (B, L, width), B = groups * group_size, the images of a group contiguous. Every patch attends
    to every patch of its group, in both directions. Regrouping is a view, (B, L, width) -> (B / N, N * L, width), so it
    copies nothing; the order of images in a group matters only through what was added to them before.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, group_size: int = 1) -> Tensor:
        images, tokens, width = x.shape
        qkv = self.qkv(x).view(images // group_size, group_size * tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (groups, heads, N * L, head width), all views
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(images, tokens, width))
