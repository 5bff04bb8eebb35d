"""Engines: one network and its optimizer on one process (single), replicated (ddp) or sharded (fsdp).

The loop does not ask which engine it has: forward, backward, `step -> grad norm` and `state` are the same with all.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from trainer.ema import EMA
from trainer.ranks import Ranks

UNIT_PARAMETERS = 1_000_000  # FSDP gathers at least so many at once: less costs more to start than to send


class EngineConfig(BaseModel, extra="forbid", frozen=True):
    """How the network is laid over the ranks. None of it changes what is computed, but for rounding."""

    engine: Literal["single", "ddp", "fsdp"] = "fsdp"
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: of matrix products and activations; weights stay fp32
    compile: bool = False  # torch.compile, block by block


Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimConfig(BaseModel, extra="forbid", frozen=True):
    """AdamW with a constant learning rate after a linear warm-up."""

    lr: float = Field(1e-4, gt=0, allow_inf_nan=False)
    warmup: int = Field(0, ge=0)  # images
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    weight_decay: float = Field(0.01, ge=0)
    clip: float | None = Field(3.0, gt=0)  # largest gradient norm; null: no clipping
    ema: float = Field(0.9999, ge=0, lt=1)  # decay per step

    def lr_at(self, position: int) -> float:
        """Learning rate of the step that brings the images seen to `position`."""
        return self.lr * min(1.0, position / self.warmup) if self.warmup else self.lr


class Engine:
    """A network laid over the ranks, its optimizer, and the EMA of its weights."""

    def __init__(self, network: nn.Module, optim: OptimConfig, autocast: Callable[[], AbstractContextManager]) -> None:
        self.network, self._autocast, self._clip = network, autocast, optim.clip
        self._parameters = list(network.parameters())
        self.optimizer = torch.optim.AdamW(
            self._parameters, lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay, fused=True
        )
        self.ema = EMA(get_model_state_dict(network), optim.ema)

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
        norm = nn.utils.clip_grad_norm_(self._parameters, self._clip or torch.inf)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update()
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """While this is open, the forward pass uses the EMA weights."""
        with self.ema.in_network():
            yield
        if isinstance(self.network, FSDPModule):
            self.network.reshard()  # the root keeps what a forward gathered until a backward: drop it with the EMA

    def state(self) -> dict[str, dict]:
        """Model, EMA and optimizer by parameter name, the same names with every engine."""
        model, optimizer = get_state_dict(self.network, self.optimizer)
        return {"model": model, "ema": self.ema.average, "optimizer": optimizer}

    def load_state(self, state: dict[str, dict]) -> None:
        """Take over a `state()` whose tensors a checkpoint has filled in place (the EMA is then already this one)."""
        set_state_dict(
            self.network, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )


def _units(blocks: list[nn.Module]) -> list[list[nn.Module]]:
    """Consecutive blocks that are gathered together: one block, or as many as make a message worth its latency."""
    units: list[list[nn.Module]] = []
    room = 0
    for block in blocks:
        if room <= 0:
            units.append([])
            room = UNIT_PARAMETERS
        units[-1].append(block)
        room -= sum(p.numel() for p in block.parameters())
    return units


def build_engine(config: EngineConfig, optim: OptimConfig, network: nn.Module, ranks: Ranks) -> Engine:
    """Lay a network, equal on all ranks, over them. The order is: compile, then shard or replicate, then the optimizer.

    The network is built whole on each rank and then cut, so weights do not depend on the number of ranks.
    """
    network.to(ranks.device)
    if config.compile:
        for block in network.blocks:
            block.compile()
    bf16 = config.precision == "bf16"
    if config.engine == "fsdp":
        mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
        # inputs stay fp32: in bf16, neighbouring timesteps would be one; the network casts behind its embeddings
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        for unit in _units(list(network.blocks)):
            fully_shard(unit, mesh=mesh, mp_policy=policy)
        fully_shard(network, mesh=mesh, mp_policy=policy)
        return Engine(network, optim, nullcontext)
    if config.engine == "ddp":
        devices = [ranks.device] if ranks.device.type == "cuda" else None
        network = DistributedDataParallel(
            network, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
        )
    return Engine(network, optim, lambda: torch.autocast(ranks.device.type, torch.bfloat16, enabled=bf16))
