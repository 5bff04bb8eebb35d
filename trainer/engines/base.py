"""Engines: one network and its optimizer on one process (single), replicated (ddp), sharded (fsdp), sharded inside
machines and replicated across them (hsdp), or laid out by DeepSpeed.

The loop does not ask which engine it has: forward, backward, `step -> grad norm` and `state` are the same with all.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as recomputed

from trainer.engines.config import EngineConfig, OptimConfig
from trainer.engines.ema import make_averages
from trainer.errors import RunError
from trainer.ranks import Ranks

UNIT_PARAMETERS = 1_000_000  # FSDP gathers at least so many at once: less costs more to start than to send


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


def _recompute(block: nn.Module) -> None:
    """Keep only the block's inputs for the backward pass (Chen et al. 2016, "Training Deep Nets with Sublinear Memory
    Cost"). By its `forward`, so that names of parameters and the hooks of engines are as without."""
    inner = block.forward

    def forward(*inputs: Tensor | int | bool | None) -> Tensor:  # a partial, torch.compile would leave alone
        return recomputed(inner, *inputs, use_reentrant=False, preserve_rng_state=False)  # nothing is random

    block.forward = forward


def build_engine(config: EngineConfig, optim: OptimConfig, network: nn.Module, ranks: Ranks) -> Engine:
    """Lay a network, equal on all ranks, over them. The order is: activation checkpointing, compile, then shard or
    replicate, then the optimizer.

    The network is built whole on each rank and then cut, so weights do not depend on the number of ranks.
    """
    network.to(ranks.device)
    if config.activation_checkpointing:
        for block in network.blocks[:: config.activation_checkpointing]:
            _recompute(block)
    if config.compile:
        # blocks share their code, whose forms count as one's: groups or none, parts of batches, training or not
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        for block in network.blocks:
            block.compile()
    bf16 = config.precision == "bf16"
    if config.engine == "deepspeed":
        os.environ["DS_ACCELERATOR"] = ranks.device.type  # it would take a GPU where there is one, used or not
        os.environ.setdefault("LOCAL_RANK", "0")
        from trainer.engines.deepspeed import DeepSpeedEngine  # importing DeepSpeed takes seconds

        return DeepSpeedEngine(network, config, optim)
    if config.engine in ("fsdp", "hsdp"):
        # inputs stay fp32: in bf16, neighbouring timesteps would be one; the network casts behind its embeddings
        precision = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        pinned = ranks.device.type == "cuda"
        offload = CPUOffloadPolicy(pin_memory=pinned) if config.offload else OffloadPolicy()
        shard = partial(fully_shard, mesh=_mesh(config, ranks), mp_policy=precision, offload_policy=offload)
        for unit in _units(list(network.blocks)):
            shard(unit)
        shard(network)
        return Engine(network, optim, nullcontext)
    if config.engine == "ddp":
        devices = [ranks.device] if ranks.device.type == "cuda" else None
        network = DistributedDataParallel(
            network, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
        )
    return Engine(network, optim, lambda: torch.autocast(ranks.device.type, torch.bfloat16, enabled=bf16))


def _mesh(config: EngineConfig, ranks: Ranks) -> DeviceMesh:
    """Of fsdp: all ranks. Of hsdp: (copies, ranks that share one), the latter neighbours, on one machine."""
    if config.engine == "fsdp":
        return init_device_mesh(ranks.device.type, (ranks.world_size,))
    size = config.shard_size or ranks.local_world_size
    if ranks.world_size % size:
        raise RunError(f"shard_size={size}: must divide the world size {ranks.world_size}; set one that does")
    return init_device_mesh(ranks.device.type, (ranks.world_size // size, size), mesh_dim_names=("replicate", "shard"))
