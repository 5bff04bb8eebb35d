"""What a forward and a backward pass of a network launch and keep, counted on the meta device."""

import copy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")  # and attention: what torch.compile leaves to libraries


class Kernels(NamedTuple):
    """Kernels of a pass; the matrix products and attentions among them."""

    all: int
    products: int


class Passes(NamedTuple):
    """Kernels of a micro-batch forward and backward; numbers of an image kept from one to the other."""

    forward: Kernels
    backward: Kernels
    kept: int


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


def count_passes(network: nn.Module, channels: int, side: int) -> Passes:
    """Return the counts for images (channels, side, side): a kernel for each operator that is no view, whatever the
    number of images, and what autograd keeps of one image besides weights, without autocast."""
    network = copy.deepcopy(network).to("meta")
    weights = {_memory(weight) for weight in network.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(_memory(tensor), tensor)
        return tensor

    number = torch.zeros(1, dtype=torch.long, device="meta")
    x = torch.zeros(1, channels, side, side, device="meta")
    with _FusedAttention(), _Count() as forward, saved_tensors_hooks(keep, lambda tensor: tensor):
        prediction = network(x, number.float(), number, number)
    with _Count() as backward:
        prediction.sum().backward()
    sizes = [
        tensor.untyped_storage().nbytes() // tensor.element_size()
        for name, tensor in kept.items()
        if name not in weights
    ]
    return Passes(Kernels(forward.all, forward.products), Kernels(backward.all, backward.products), sum(sizes))


def _memory(tensor: Tensor) -> int:
    """Return what views of one tensor have in common, also on the meta device, where all pointers are 0."""
    return tensor.untyped_storage()._cdata
