"""Engines: one network and its optimizer on one process (single), replicated (ddp), sharded (fsdp), sharded inside
machines and replicated across them (hsdp), or laid out by DeepSpeed.

The loop does not ask which engine it has: forward, backward, `step -> grad norm` and `state` are the same with all.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from trainer.engines.config import OptimConfig
from trainer.engines.ema import make_averages


class Engine:
    """A network laid over the ranks, its optimizer, and averages of its weights."""

    def __init__(self, network: nn.Module, optim: OptimConfig, autocast: Callable[[], AbstractContextManager]) -> None:
        self.network, self._autocast, self._clip = network, autocast, optim.clip
        bare = network.module if isinstance(network, DistributedDataParallel) else network
        self.weights = dict(bare.named_parameters())
        self.optimizer = adamw(list(self.weights.values()), optim)
        self.averages, self.steps = make_averages(self.weights, optim), 0

    def __call__(self, *inputs: Tensor | int) -> Tensor:
        """The network's forward pass, in the configured precision."""
        with self._autocast():
            return self.network(*inputs)

    def accumulating(self, last: bool) -> AbstractContextManager:
        """Around forward and backward of a micro-batch: ranks exchange gradients in the `last` one of a step only."""
        if isinstance(self.network, DistributedDataParallel) and not last:
            return self.network.no_sync()
        if isinstance(self.network, FSDPModule):
            self.network.set_requires_gradient_sync(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro-batch's part of the step's loss."""
        loss.backward()

    def step(self, lr: float) -> Tensor:
        """Clip, update weights and EMA, clear gradients. Returns the gradient norm before clipping, on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        norm = nn.utils.clip_grad_norm_(self.weights.values(), self._clip or torch.inf)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.update_averages()
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def update_averages(self) -> None:
        """After each step."""
        self.steps += 1
        for average in self.averages.values():
            average.update(self.steps)

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """While this is open, the forward pass uses the EMA weights."""
        self.drop_gathered()
        with self.averages["ema"].in_network():
            yield
            self.drop_gathered()

    def drop_gathered(self) -> None:
        """What the network has gathered of its shards must be gathered anew: the shards are others now."""
        if isinstance(self.network, FSDPModule):
            self.network.reshard()  # the root keeps what a forward pass gathered until a backward pass

    def state(self) -> dict[str, dict]:
        """model, ema and other averages, and optimizer by parameter name, the same names and shapes with every engine.
        The tensors are the engine's own: what is loaded into them is loaded."""
        moments = {name: self.optimizer.state[weight] for name, weight in self.weights.items()}
        averages = {name: ema.average for name, ema in self.averages.items()}
        return {"model": self.weights, **averages, "optimizer": {"state": moments}}

    def load_state(self, state: dict[str, dict], steps: int) -> None:
        """Go on after so many steps from a `state()` whose tensors a checkpoint has filled: they are ours already."""
        self.steps = steps


def adamw(parameters: list[Tensor], optim: OptimConfig) -> torch.optim.AdamW:
    """The optimizer, with its state: memory is taken before the first step, and a checkpoint has where to go."""
    optimizer = torch.optim.AdamW(
        parameters, lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay, fused=True
    )
    for parameter in parameters:
        init_moments(optimizer, parameter)
    return optimizer


def init_moments(optimizer: torch.optim.AdamW, parameter: Tensor) -> None:
    """What AdamW would make of a parameter's state at its first step."""
    with torch.no_grad():
        moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
    optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}
