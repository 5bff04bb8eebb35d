"""Averages of the weights over training steps."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, _foreach_copy_, _foreach_lerp_  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.tensor import DTensor

from trainer.engines.config import OptimConfig
from trainer.engines.power_ema import power_decay

POWER = "ema-"  # followed by the std: the name of an average with a power profile
FURTHER = "ema_"  # followed by the decay: the name of an average after the first of `optim.ema`


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
    """Return averages by their names in checkpoints: "ema", of exponential decay, the further ones of `optim.ema`, and
    those of `optim.power_ema`."""
    names = ["ema", *(f"{FURTHER}{decay}" for decay in optim.ema[1:])]
    decays = {name: partial(_constant, decay) for name, decay in zip(names, optim.ema, strict=True)}
    powers = {power_name(std): power_decay(std) for std in optim.power_ema}
    return {name: EMA(weights, decay) for name, decay in (decays | powers).items()}


def _constant(decay: float, step: int) -> float:
    return decay


def power_averages(state: dict[str, dict]) -> dict[str, dict]:
    """Return the part of an engine's state that a snapshot holds."""
    return {name: part for name, part in state.items() if name.startswith(POWER)}
