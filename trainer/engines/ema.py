"""Averages of the weights over training steps."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, _foreach_copy_, _foreach_lerp_  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.tensor import DTensor

from trainer.engines.config import OptimConfig
from trainer.engines.power_ema import power_decay

POWER = "ema-"  # followed by the std: the name of an average with a power profile


def local_shards(tensors: dict[str, Tensor]) -> list[Tensor]:
    """Return the part of each tensor that this rank holds, in the same memory: writing to it writes to the tensor."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors.values()]


class EMA:
    """The average of `weights` (name -> parameter): average = decay * average + (1 - decay) * weight, after each step.

    It is distributed like the weights: each rank averages its own shards. `decay` is a function of the step.
    """

    def __init__(self, weights: dict[str, Tensor], decay: Callable[[int], float]) -> None:
        self.weights, self._decay = weights, decay
        self.average = {name: weight.detach().clone() for name, weight in weights.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update in place, without communication, after a step; steps are counted from 1."""
        _foreach_lerp_(local_shards(self.average), local_shards(self.weights), 1 - self._decay(step))

    @contextmanager
    def in_network(self) -> Iterator[None]:
        """While this is open, put the average in place of the weights."""
        with torch.no_grad():
            weights, average = local_shards(self.weights), local_shards(self.average)
            kept = [weight.clone() for weight in weights]
            _foreach_copy_(weights, average)
        try:
            yield
        finally:
            with torch.no_grad():
                _foreach_copy_(weights, kept)


def power_name(std: float) -> str:
    """Return the name, in checkpoints and snapshots, of the average with a power profile of this std."""
    return f"{POWER}{std}"


def make_averages(weights: dict[str, Tensor], optim: OptimConfig) -> dict[str, EMA]:
    """Return averages by their names in checkpoints: "ema", of exponential decay, and those of `optim.power_ema`."""
    powers = {power_name(std): EMA(weights, power_decay(std)) for std in optim.power_ema}
    return {"ema": EMA(weights, lambda step: optim.ema), **powers}


def power_averages(state: dict[str, dict]) -> dict[str, dict]:
    """Return the part of an engine's state that a snapshot holds."""
    return {name: part for name, part in state.items() if name.startswith(POWER)}
