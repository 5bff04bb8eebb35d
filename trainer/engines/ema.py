"""Exponential moving average of the weights, kept as the weights are: each rank averages its own shards."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from trainer.engines.config import OptimConfig
from trainer.engines.power_ema import power_decay

POWER = "ema-"  # then the std


def local_shards(tensors: dict[str, Tensor]) -> list[Tensor]:
    """What this rank holds of each tensor: its own memory, so writing into it writes into the tensors."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors.values()]


class EMA:
    """`weights` (name -> live parameter) and their average: average = decay * average + (1 - decay) * weight.

    It is kept as the weights are: each rank averages its own shards. `decay` may depend on the step.
    """

    def __init__(self, weights: dict[str, Tensor], decay: Callable[[int], float]) -> None:
        self.weights, self._decay = weights, decay
        self.average = {name: weight.detach().clone() for name, weight in weights.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Once after each step (counted from 1); in place, without communication."""
        torch._foreach_lerp_(local_shards(self.average), local_shards(self.weights), 1 - self._decay(step))

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


def power_name(std: float) -> str:
    """What the averages of a power profile are called in checkpoints and snapshots."""
    return f"{POWER}{std}"


def make_averages(weights: dict[str, Tensor], optim: OptimConfig) -> dict[str, EMA]:
    """By their names in checkpoints: `ema`, of exponential decay, and those of `optim.power_ema`."""
    powers = {power_name(std): EMA(weights, power_decay(std)) for std in optim.power_ema}
    return {"ema": EMA(weights, lambda step: optim.ema), **powers}


def power_averages(state: dict[str, dict]) -> dict[str, dict]:
    """Of an engine's state, what a snapshot holds."""
    return {name: part for name, part in state.items() if name.startswith(POWER)}
