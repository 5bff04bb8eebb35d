"""Exponential moving average of the weights, kept as the weights are: each rank averages its own shards."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def local_shards(tensors: dict[str, Tensor]) -> list[Tensor]:
    """What this rank holds of each tensor: its own memory, so writing into it writes into the tensors."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors.values()]


class EMA:
    """`weights` (name -> live parameter) and their average: average = decay * average + (1 - decay) * weight."""

    def __init__(self, weights: dict[str, Tensor], decay: float) -> None:
        self.weights, self.decay = weights, decay
        self.average = {name: weight.detach().clone() for name, weight in weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Once after each step; in place, without communication."""
        torch._foreach_lerp_(local_shards(self.average), local_shards(self.weights), 1 - self.decay)

    @contextmanager
    def in_network(self) -> Iterator[None]:
        """While this is open, the network has the averaged weights."""
        with torch.no_grad():
            weights, average = local_shards(self.weights), local_shards(self.average)
            kept = [weight.clone() for weight in weights]
            torch._foreach_copy_(weights, average)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(weights, kept)
