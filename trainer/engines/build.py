"""Lay a network over the ranks: activation checkpointing, compile, then shard or replicate, then the optimizer."""

import os
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as recomputed

from trainer.engines.base import Engine
from trainer.engines.config import EngineConfig, OptimConfig
from trainer.errors import RunError
from trainer.ranks import Ranks

UNIT_PARAMETERS = 1_000_000  # FSDP gathers at least so many at once: less costs more to start than to send


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
