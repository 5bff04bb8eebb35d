"""The stages of ZeRO (Rajbhandari et al. 2020, "ZeRO"): how each lays out weights and moments, and how to undo it.

This is the only file that imports DeepSpeed, which takes seconds.
"""

import logging
import warnings
from functools import partial
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed import comm, utils
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from trainer.engines.deepspeed_config import BUCKET
from trainer.engines.optimizer import init_moments
from trainer.ranks import Ranks

library: Any = deepspeed
library.ops.__compatible_ops__ = {}  # DeepSpeed would try to compile them all, and spend a minute on one; none is used
# raised by each collective that DeepSpeed calls, since torch 2.13
warnings.filterwarnings("ignore", r"`torch.distributed.\w+` is deprecated", FutureWarning)
MOMENTS = ("exp_avg", "exp_avg_sq")


def initialize(model: nn.Module, adamw: torch.optim.AdamW, settings: dict[str, Any]) -> Any:
    """Return DeepSpeed's engine of a model, in the process group of torch.distributed."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    comm.init_distributed(dist_backend=dist.get_backend())  # takes over the existing process group
    engine, *_ = library.initialize(model=model, optimizer=adamw, config=settings, dist_init_required=False)
    return engine


class Replicated:
    """Stage 0: every rank has everything, and AdamW works on the parameters."""

    def __init__(self, engine: Any, adamw: torch.optim.AdamW, weights: dict[str, Tensor], ranks: Ranks) -> None:
        self.engine, self.weights = engine, weights
        self.adamw: torch.optim.AdamW = adamw
        # DeepSpeed would copy all gradients into one buffer: no key of its configuration splits that
        engine.allreduce_gradients = partial(engine.allreduce_gradients, bucket_size=BUCKET)
        init_moments(adamw, weights.values())

    def step(self, clip: float | None) -> Tensor:
        """Clip, update and clear; return the norm before clipping. DeepSpeed would clip too, but not tell the norm."""
        norm = nn.utils.clip_grad_norm_(self.weights.values(), clip or torch.inf)
        self.engine.step()
        return norm

    def reshard(self) -> None:
        """Do nothing: nothing is gathered."""

    def kept(self) -> dict[str, Tensor]:
        """Return what this rank keeps of the weights between steps; averages are kept the same way."""
        return self.weights

    def to_rows(self, kept: Tensor, shape: torch.Size) -> Tensor:
        """Return what a checkpoint stores for a tensor that is `kept`."""
        return kept

    def from_rows(self, kept: Tensor, rows: Tensor) -> None:
        """Copy what a checkpoint stored into a tensor that is `kept`: here it is the same tensor."""

    def moments(self, name: str) -> dict[str, Tensor]:
        """Return AdamW's state of a parameter, as a checkpoint stores it."""
        return self.adamw.state[self.weights[name]]

    def load_moments(self, moments: dict[str, dict[str, Tensor]]) -> None:
        """Take over weights, once they are loaded, and moments: here they are our own tensors."""


class OptimizerShards(Replicated):
    """Stages 1 and 2: AdamW works on this rank's parts of flat groups of weights; weights are whole."""

    def __init__(self, engine: Any, adamw: torch.optim.AdamW, weights: dict[str, Tensor], ranks: Ranks) -> None:
        self.engine, self.weights = engine, weights
        self.adamw = engine.optimizer.optimizer
        self._mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
        self._share_weights()
        init_moments(self.adamw, self._optimized())
        self._link_moments()

    def _optimized(self) -> list[Tensor]:
        """Return the flat tensors that AdamW updates on this rank, one per group."""
        return self.engine.optimizer.single_partition_of_fp32_groups

    def _shards(self) -> list[Tensor]:
        """Return the weights behind `_optimized`."""
        return [cut[dist.get_rank()] for cut in self.engine.optimizer.parallel_partitioned_bit16_groups]

    def _share_weights(self) -> None:
        """Let AdamW work on the weights themselves: they are fp32, and need no master copy."""
        for master, shard in zip(self._optimized(), self._shards(), strict=True):
            if (master.shape, master.device) == (shard.shape, shard.device):  # not offloaded to the host
                master.data = shard.data

    def _link_moments(self) -> None:
        """Tell DeepSpeed where weights and moments are now."""
        optimizer = self.engine.optimizer
        optimizer._link_all_hp_params()
        for group, flat in zip(optimizer.bit16_groups, self._optimized(), strict=True):
            utils.lazy_init_hp_params_optimizer_state(group, flat, self.adamw.state)

    def step(self, clip: float | None) -> Tensor:
        """Update and clear; return the norm before clipping. DeepSpeed does the clipping, by its configuration."""
        self.engine.step()
        return torch.as_tensor(self.engine.get_global_grad_norm(), device=self.engine.device)

    def moments(self, name: str) -> dict[str, Tensor]:
        """Return AdamW's state of a parameter: copies, sharded along the first dimension."""
        step = self.adamw.state[self._optimized()[0]]["step"].clone()  # the same for all parameters
        return {"step": step, **{key: self._moment(name, key) for key in MOMENTS}}

    def _moment(self, name: str, key: str) -> Tensor:
        return self._cut(_found(utils.safe_get_full_optimizer_state(self.weights[name], key)))

    def load_moments(self, moments: dict[str, dict[str, Tensor]]) -> None:
        """Take over weights, once they are loaded, and moments."""
        for name, state in moments.items():
            self._load_weight(name)
            for key in MOMENTS:
                self._load_moment(name, key, state[key])
        for flat in self._optimized():
            self.adamw.state[flat]["step"].copy_(next(iter(moments.values()))["step"])

    def _load_weight(self, name: str) -> None:
        """Copy a weight to AdamW's master copy, if there is one."""
        utils.safe_set_full_fp32_param(self.weights[name], self.weights[name])

    def _load_moment(self, name: str, key: str, rows: Tensor) -> None:
        utils.safe_set_full_optimizer_state(self.weights[name], _whole(rows), key)

    def _cut(self, whole: Tensor) -> DTensor:
        """Return this rank's rows of a tensor that all ranks have."""
        rows = whole.chunk(dist.get_world_size())
        mine = rows[dist.get_rank()] if dist.get_rank() < len(rows) else whole[:0]
        return DTensor.from_local(
            mine.clone(), self._mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
        )


class WeightShards(OptimizerShards):
    """Stage 3: each rank keeps a flat part of each weight, of equal size and padded; AdamW works on groups of parts."""

    def _optimized(self) -> list[Tensor]:
        return self.engine.optimizer.fp32_partitioned_groups_flat

    def _shards(self) -> list[Tensor]:
        return self.engine.optimizer.fp16_partitioned_groups_flat

    def _link_moments(self) -> None:
        """Do nothing: DeepSpeed looks up weights and moments itself."""

    def reshard(self) -> None:
        """Free the weights that DeepSpeed has gathered."""
        self.engine.optimizer.empty_partition_cache()  # the engine's own also collects garbage, which is slow

    def kept(self) -> dict[str, Tensor]:
        """Return this rank's parts."""
        return {name: _shard(weight) for name, weight in self.weights.items()}

    def to_rows(self, kept: Tensor, shape: torch.Size) -> Tensor:
        """Return rows: shards along the first dimension, assembled from the ranks' flat parts."""
        padded = kept.new_empty(dist.get_world_size() * kept.numel())
        dist.all_gather_into_tensor(padded, kept.contiguous())
        return self._cut(padded[: shape.numel()].view(shape))

    def from_rows(self, kept: Tensor, rows: Tensor) -> None:
        """Copy into this rank's flat part: the inverse of `to_rows`."""
        kept.copy_(self._flat(rows, kept.numel()))

    def _flat(self, rows: Tensor, size: int) -> Tensor:
        """Return this rank's flat part, `size` numbers, of `rows`."""
        padded = nn.functional.pad(_whole(rows).flatten(), (0, size * dist.get_world_size()))
        return padded.narrow(0, size * dist.get_rank(), size)

    def _moment(self, name: str, key: str) -> Tensor:
        weight: Any = self.weights[name]
        return self.to_rows(_found(utils.safe_get_local_optimizer_state(weight, key)), weight.ds_shape)

    def _load_weight(self, name: str) -> None:
        weight = self.weights[name]
        utils.safe_set_local_fp32_param(weight, _shard(weight))

    def _load_moment(self, name: str, key: str, rows: Tensor) -> None:
        weight = self.weights[name]
        utils.safe_set_local_optimizer_state(weight, self._flat(rows, _shard(weight).numel()), key)


STAGES = {0: Replicated, 1: OptimizerShards, 2: OptimizerShards, 3: WeightShards}


def _shard(weight: Any) -> Tensor:
    return weight.ds_tensor


def _found(tensor: Tensor | None) -> Tensor:
    assert tensor is not None, "DeepSpeed knows no such state"
    return tensor


def _whole(rows: Tensor) -> Tensor:
    assert isinstance(rows, DTensor)
    return rows.full_tensor()
