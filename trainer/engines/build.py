"""The engines, and how one is built."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from trainer.engines.base import Engine
from trainer.engines.config import EngineConfig, OptimConfig
from trainer.engines.ddp import DDP
from trainer.engines.deepspeed import DeepSpeed
from trainer.engines.fsdp import FSDP, HSDP
from trainer.engines.optimizer import OPTIMIZERS, RULES
from trainer.engines.single import Single
from trainer.ranks import Ranks

ENGINES: dict[str, type[Engine]] = {"single": Single, "ddp": DDP, "fsdp": FSDP, "hsdp": HSDP, "deepspeed": DeepSpeed}


def check_engine(config: EngineConfig, optim: OptimConfig) -> None:
    """Raise ValueError unless engine, optimizer and rule exist, and the engine has what the config asks for."""
    named = {
        "engine": (config.engine, ENGINES),
        "optim.name": (optim.name, OPTIMIZERS),
        "optim.decay": (optim.decay, RULES),
    }
    for field, (name, known) in named.items():
        if name not in known:
            raise ValueError(f"{field}={name}: input should be {' or '.join(map(repr, known))}")
    for option in dict.fromkeys(option for engine in ENGINES.values() for option in engine.options):
        value, fitting = getattr(config, option), [name for name in ENGINES if option in ENGINES[name].options]
        if value and config.engine not in fitting:
            raise ValueError(f"{option}={value}: engine={config.engine} has no such thing; set engine={fitting[0]}")
    ENGINES[config.engine].check(config, optim)


def check_ranks(config: EngineConfig, world_size: int) -> None:
    """Raise RunError if the engine cannot use `world_size` ranks."""
    ENGINES[config.engine].check_ranks(config, world_size)


def build_engine(
    config: EngineConfig, optim: OptimConfig, network: nn.Module, ranks: Ranks, heads: nn.ModuleDict | None = None
) -> Engine:
    """Distribute a network and its heads, identical on all ranks: activation checkpointing, then compile, then shard or
    replicate, then the optimizer.

    Both are built whole on each rank and then sharded, so weights do not depend on the number of ranks. `Engine` says
    what heads are, and how to call them.
    """
    heads = nn.ModuleDict() if heads is None else heads
    network.to(ranks.device)
    heads.to(ranks.device)
    blocks = list(network.get_submodule("blocks").children())
    if config.activation_checkpointing:
        for block in blocks[:: config.activation_checkpointing]:
            _recompute(block)
    if config.compile:
        # blocks share their code, so all variants count as one block's: groups or not, partial batches, training or not
        dynamo = torch._dynamo.config
        dynamo.recompile_limit = max(64, dynamo.recompile_limit)
        for block in blocks:
            block.compile()
    return ENGINES[config.engine](network, heads, config, optim, ranks)


def _recompute(block: nn.Module) -> None:
    """Keep only the block's inputs for the backward pass (Chen et al. 2016, "Training Deep Nets with Sublinear Memory
    Cost"). Replace the block's `forward`, so that parameter names and the hooks of engines stay the same."""
    inner = block.forward

    def forward(*inputs: Tensor | int | bool | None) -> Tensor:  # torch.compile would not trace a partial
        return recomputed(inner, *inputs, use_reentrant=False, preserve_rng_state=False)  # none is used

    block.forward = forward
