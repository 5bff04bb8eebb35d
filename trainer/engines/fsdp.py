"""Weights, gradients, moments and averages sharded over the ranks by PyTorch's `fully_shard`."""

from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from trainer.engines.base import Shards
from trainer.engines.config import EngineConfig, OptimConfig
from trainer.engines.single import Single
from trainer.errors import RunError
from trainer.ranks import Ranks

UNIT_PARAMETERS = 1_000_000  # gathered at once at least: with fewer, latency costs more than bandwidth


class FSDP(Single):
    """Everything is sharded over all ranks (Zhao et al. 2023, "PyTorch FSDP").

    In bf16, which is autocast here too, blocks are gathered as autocast would round them: their matrices and biases in
    bf16, and in fp32, with what is outside of blocks, the vectors that scale tokens, like the weights of norms.

    Heads are sharded too, each gathered by itself, and keep fp32: `autocast` gives them their precision. They exchange
    gradients in each micro-batch, so that a head need not be called in the last one.
    """

    options = ("offload",)

    def __init__(
        self, network: nn.Module, heads: nn.ModuleDict, config: EngineConfig, optim: OptimConfig, ranks: Ranks
    ) -> None:
        bf16, blocks = config.precision == "bf16", list(network.get_submodule("blocks").children())
        scales = nn.ParameterList(_scales(blocks) if bf16 else [])
        precision = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        pinned = ranks.device.type == "cuda"
        offload = CPUOffloadPolicy(pin_memory=pinned) if config.offload else OffloadPolicy()
        shard = partial(fully_shard, mesh=self.mesh(config, ranks), offload_policy=offload)
        for unit in units(blocks):
            shard(unit, mp_policy=precision, ignored_params=set(scales))
        network.add_module("scales", scales)  # for a moment: a unit takes the parameters of the modules that it finds
        self._sharded = shard(network)
        del network.scales
        for head in heads.children():
            shard(head)
        super().__init__(network, heads, config, optim, ranks)

    @classmethod
    def check_ranks(cls, config: EngineConfig, world_size: int) -> None:
        """Accept any number."""

    @classmethod
    def shards(cls, config: EngineConfig, world_size: int) -> Shards:
        """Share everything."""
        return Shards(world_size, world_size, world_size)

    @classmethod
    def mesh(cls, config: EngineConfig, ranks: Ranks) -> DeviceMesh:
        """Return the ranks that share one copy: all."""
        return init_device_mesh(ranks.device.type, (ranks.world_size,))

    def accumulating(self, last: bool) -> AbstractContextManager:
        """Exchange gradients in the last micro-batch of a step only."""
        self._sharded.set_requires_gradient_sync(last)
        return nullcontext()

    def step(self, lr: float) -> Tensor:
        """Do the same as one process, on shards. Return the norm over all of them."""
        norm = super().step(lr)
        assert isinstance(norm, DTensor)
        return norm.full_tensor()

    def reshard(self) -> None:
        """Free the weights that the root keeps from a forward pass until a backward pass."""
        self._sharded.reshard()


class HSDP(FSDP):
    """Everything is sharded over `shard_size` neighbouring ranks (default: a machine's) and replicated across these."""

    options = ("offload", "shard_size")

    @classmethod
    def check_ranks(cls, config: EngineConfig, world_size: int) -> None:
        """Raise RunError unless the ranks hold whole copies."""
        size = config.shard_size or 1
        if world_size % size:
            raise RunError(f"shard_size={size}: must divide the world size {world_size}; set one that does")

    @classmethod
    def shards(cls, config: EngineConfig, world_size: int) -> Shards:
        """Share everything within a copy; without `shard_size`, on one machine, that is the whole world."""
        size = config.shard_size or world_size
        return Shards(size, size, size)

    @classmethod
    def mesh(cls, config: EngineConfig, ranks: Ranks) -> DeviceMesh:
        """Return the ranks as (copies, ranks that share one copy)."""
        size = config.shard_size or ranks.local_world_size
        cls.check_ranks(config.model_copy(update={"shard_size": size}), ranks.world_size)
        shape = (ranks.world_size // size, size)
        return init_device_mesh(ranks.device.type, shape, mesh_dim_names=("replicate", "shard"))


def _scales(blocks: list[nn.Module]) -> list[nn.Parameter]:
    """Return the blocks' vectors that are no biases of layers: what autocast leaves in fp32."""
    modules = [module for block in blocks for module in block.modules() if not isinstance(module, nn.Linear)]
    return [weight for module in modules for weight in module.parameters(recurse=False) if weight.ndim < 2]


def units(blocks: list[nn.Module]) -> list[list[nn.Module]]:
    """Return consecutive blocks that are gathered together: one, or as many as make a message worth its latency."""
    units: list[list[nn.Module]] = []
    room = 0
    for block in blocks:
        if room <= 0:
            units.append([])
            room = UNIT_PARAMETERS
        units[-1].append(block)
        room -= sum(parameter.numel() for parameter in block.parameters())
    return units
