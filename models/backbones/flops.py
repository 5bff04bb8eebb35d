"""Multiply-adds of a network, counted by fvcore, attention included."""

import copy
from math import prod

import torch
from fvcore.nn import FlopCountAnalysis
from torch import Tensor, nn


def _attention(inputs: list, outputs: list) -> int:
    """Return the multiply-adds of q k^T and its product with v: 2 * groups * heads * queries * keys * head width."""
    q, k = (value.type().sizes() for value in inputs[:2])
    return 2 * prod(q) * k[-2]


class _Grouped(nn.Module):
    """A network with its group size bound, because fvcore traces modules with only tensors as inputs."""

    def __init__(self, network: nn.Module, group_size: int) -> None:
        super().__init__()
        self.network, self.group_size = network, group_size

    def forward(self, x: Tensor, t: Tensor, label: Tensor, slot: Tensor) -> Tensor:
        return self.network(x, t, label, slot, self.group_size)


def forward_multiply_adds(network: nn.Module, images: int, channels: int, side: int, group_size: int) -> int:
    """Return the multiply-adds of one forward pass over `images` images (channels, side, side) in groups of
    `group_size`.

    Count them on the meta device, where fvcore sees scaled_dot_product_attention as one operator (not so on a CPU).
    """
    network = _Grouped(copy.deepcopy(network).to("meta"), group_size)
    number = torch.zeros(images, dtype=torch.long, device="meta")
    x = torch.zeros(images, channels, side, side, device="meta")
    count = FlopCountAnalysis(network, (x, number.float(), number, number))
    count.set_op_handle("aten::scaled_dot_product_attention", _attention)
    return int(count.unsupported_ops_warnings(False).uncalled_modules_warnings(False).total())
