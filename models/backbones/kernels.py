"""Kernels that a network launches, counted on the meta device."""

import copy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")  # and attention: what torch.compile leaves to libraries


class Kernels(NamedTuple):
    """Kernels of a pass; the matrix products and attentions among them."""

    all: int
    products: int


class _Count(TorchDispatchMode):
    """Count the operators that compute something: not views."""

    def __init__(self) -> None:
        super().__init__()
        self.all = self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and name != "_unsafe_view":
            self.all += 1
            self.products += name in PRODUCTS or "attention" in name
        return func(*args, **(kwargs or {}))


class _FusedAttention(TorchFunctionMode):
    """Let attention be one operator, as on a GPU; the meta device would take it apart."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention and not kwargs and len(args) == 3:
            return torch.ops.aten._scaled_dot_product_flash_attention(*args)[0]
        return func(*args, **(kwargs or {}))


def count_kernels(network: nn.Module, channels: int, side: int) -> tuple[Kernels, Kernels]:
    """Return the kernels of a forward and of a backward pass over images (channels, side, side), as many as you like:
    one for each operator that is no view."""
    network = copy.deepcopy(network).to("meta")
    number = torch.zeros(1, dtype=torch.long, device="meta")
    x = torch.zeros(1, channels, side, side, device="meta")
    with _FusedAttention(), _Count() as forward:
        prediction = network(x, number.float(), number, number)
    with _Count() as backward:
        prediction.sum().backward()
    return Kernels(forward.all, forward.products), Kernels(backward.all, backward.products)
