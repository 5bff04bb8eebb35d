"""The contract of an engine: how a network and its heads are distributed over the ranks, trained, saved and loaded."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from trainer.engines.config import EngineConfig, OptimConfig
from trainer.engines.ema import EMA
from trainer.engines.optimizer import HEADS
from trainer.ranks import Ranks


class Shards(NamedTuple):
    """The number of ranks that share one copy of each of these."""

    weights: int  # and their averages
    gradients: int
    moments: int


class Engine(ABC):
    """A network and its heads distributed over the ranks, their optimizer, and averages of the network's weights.

    The loop does not ask which engine it has. A step is, on all ranks alike:

        for each micro-batch:
            with engine.accumulating(last=...):
                prediction = engine(x_t, t, label, slot, group_size, grouped)
                with engine.autocast():
                    extra = heads["name"](hidden)
                engine.backward(loss)
        norm = engine.step(lr)

    Heads are modules that loss terms own. The same optimizer trains them by the same rule, and checkpoints hold them;
    they are neither averaged nor exported. The caller keeps the modules and calls them by their forward: after the
    network's forward pass of the same micro-batch, before `backward`, inside `autocast`. If one rank calls a head in a
    micro-batch, all ranks do; each head is called in each step. Without heads, nothing of this exists.

    To add an engine, write a subclass, of this or of another engine, and give it a line in ENGINES (build.py).
    """

    options: ClassVar[tuple[str, ...]] = ()  # the fields of EngineConfig that only this and some other engines use
    network: nn.Module  # computes the prediction, and may be wrapped; analyses observe its layers
    weights: dict[str, Tensor]  # of the network, by name, as they are trained on this rank
    averages: dict[str, EMA]  # of `weights`, by their name in checkpoints; "ema" is the one that makes samples
    steps: int = 0  # taken so far, including those before a checkpoint

    @classmethod
    @abstractmethod
    def check(cls, config: EngineConfig, optim: OptimConfig) -> None:
        """Raise ValueError (`field=value: ...`) if this engine cannot do what the config asks for."""

    @classmethod
    @abstractmethod
    def check_ranks(cls, config: EngineConfig, world_size: int) -> None:
        """Raise RunError (`field=value: ...`) if this engine cannot use `world_size` ranks."""

    @classmethod
    @abstractmethod
    def shards(cls, config: EngineConfig, world_size: int) -> Shards:
        """Return how the ranks share the states, on which the estimate of memory and communication is based."""

    @abstractmethod
    def __init__(
        self, network: nn.Module, heads: nn.ModuleDict, config: EngineConfig, optim: OptimConfig, ranks: Ranks
    ) -> None:
        """Take a network and heads that are whole, on the device, and identical on all ranks; `heads` may be empty."""

    @abstractmethod
    def __call__(self, *inputs: Tensor | int | None) -> Tensor:
        """Return the network's prediction, computed in the configured precision."""

    @abstractmethod
    def autocast(self) -> AbstractContextManager:
        """Give heads the precision of the network's matrix products, whatever the precision of their inputs."""

    @abstractmethod
    def accumulating(self, last: bool) -> AbstractContextManager:
        """Surround the forward and backward pass of a micro-batch. Ranks need not exchange gradients before the `last`
        one of a step."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro-batch's part of this rank's loss. The step's gradient is the mean over ranks."""

    @abstractmethod
    def step(self, lr: float) -> Tensor:
        """Clip the gradient, update weights and averages, clear the gradient.

        Return the gradient's norm before clipping, over network and heads, on the device: a scalar, equal on all ranks.
        """

    @abstractmethod
    def state(self) -> dict[str, dict]:
        """Return what a checkpoint holds: the same names and (global) shapes with every engine and world size.

        {"model": {name: tensor}, "heads": {"<head>.<parameter>": tensor}, "ema" and the other averages: {name: tensor},
        "optimizer": {"state": {name: {key: tensor}}}}. There is no "heads" without heads; the optimizer's names are
        those of the network and "heads.<head>.<parameter>". Some engines return their own tensors, others copies.
        """

    @abstractmethod
    def load_state(self, state: dict[str, dict], steps: int) -> None:
        """Resume after `steps` steps from what `state` returned, once a checkpoint has filled its tensors in place."""

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """While this is open, compute predictions with the averaged weights."""
        self.reshard()
        with self.averages["ema"].in_network():
            yield
            self.reshard()

    @abstractmethod
    def reshard(self) -> None:
        """Free the gathered copies of sharded weights, so that the next forward pass gathers the current shards."""

    def update_averages(self) -> None:
        """Count a step and update the averages: the end of each step."""
        self.steps += 1
        for average in self.averages.values():
            average.update(self.steps)


def head_weights(heads: nn.ModuleDict) -> dict[str, Tensor]:
    """Return the heads' parameters by their names in the optimizer."""
    return {f"{HEADS}.{name}": weight for name, weight in heads.named_parameters()}
