"""One process with the whole network; the base of the engines that replicate or shard it."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from trainer.engines.base import Engine, Shards, head_weights
from trainer.engines.config import EngineConfig, OptimConfig
from trainer.engines.ema import make_averages
from trainer.engines.optimizer import HEADS, make_optimizer
from trainer.errors import RunError
from trainer.ranks import Ranks


class Single(Engine):
    """One process. The tensors of its `state` are its own, so filling them from a checkpoint loads them.

    A subclass distributes network and heads before it calls this constructor, which takes the parameters as they are
    then.
    """

    def __init__(
        self, network: nn.Module, heads: nn.ModuleDict, config: EngineConfig, optim: OptimConfig, ranks: Ranks
    ) -> None:
        self.network, self._clip = network, optim.clip
        self._device, self._bf16 = ranks.device.type, config.precision == "bf16"
        self.weights = dict(network.named_parameters())
        self.head_weights = head_weights(heads)
        self.trained = self.weights | self.head_weights
        self.optimizer = make_optimizer(self.trained, optim)
        self.averages = make_averages(self.weights, optim)

    @classmethod
    def check(cls, config: EngineConfig, optim: OptimConfig) -> None:
        """Accept everything."""

    @classmethod
    def check_ranks(cls, config: EngineConfig, world_size: int) -> None:
        """Raise RunError if there is more than one rank."""
        if world_size > 1:
            raise RunError(f"engine={config.engine}: cannot use {world_size} ranks; set engine=fsdp or engine=ddp")

    @classmethod
    def shards(cls, config: EngineConfig, world_size: int) -> Shards:
        """Share nothing."""
        return Shards(1, 1, 1)

    def __call__(self, *inputs: Tensor | int | None) -> Tensor:
        """Return the network's prediction, computed in the configured precision."""
        with self.autocast():
            return self.network(*inputs)

    def autocast(self) -> AbstractContextManager:
        """Compute matrix products in the configured precision."""
        return torch.autocast(self._device, torch.bfloat16, enabled=self._bf16)

    def accumulating(self, last: bool) -> AbstractContextManager:
        """Do nothing: there is no other rank to exchange gradients with."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro-batch's part of the step's loss."""
        loss.backward()

    def step(self, lr: float) -> Tensor:
        """Clip the gradient, update weights and averages, clear the gradient. Return its norm before clipping."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        norm = nn.utils.clip_grad_norm_(self.trained.values(), self._clip or torch.inf)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.update_averages()
        return norm

    def reshard(self) -> None:
        """Do nothing: nothing is sharded."""

    def state(self) -> dict[str, dict]:
        """Return the engine's own tensors, as `Engine.state` describes them."""
        heads = {name.removeprefix(f"{HEADS}."): weight for name, weight in self.head_weights.items()}
        moments = {name: self.optimizer.state[weight] for name, weight in self.trained.items()}
        return {
            "model": self.weights,
            **({HEADS: heads} if heads else {}),
            **{name: ema.average for name, ema in self.averages.items()},
            "optimizer": {"state": {name: tensors for name, tensors in moments.items() if tensors}},
        }

    def load_state(self, state: dict[str, dict], steps: int) -> None:
        """Resume after `steps` steps: the tensors of `state` are the engine's own, and filled already."""
        self.steps = steps
