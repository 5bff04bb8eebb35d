"""The engine that DeepSpeed's library provides: ZeRO stages 0 to 3 (Rajbhandari et al. 2020, "ZeRO")."""

import logging
import warnings
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import deepspeed
import torch
import torch.distributed as dist
from deepspeed import comm
from deepspeed.utils import (
    lazy_init_hp_params_optimizer_state,
    safe_get_full_optimizer_state,
    safe_get_local_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from trainer.engines.base import Engine, init_moments
from trainer.engines.config import EngineConfig, OptimConfig
from trainer.engines.deepspeed_config import BUCKET, deepspeed_config
from trainer.engines.ema import make_averages

deepspeed.ops.__compatible_ops__ = {}  # it would try to compile them all, and compile one for a minute; none is used
# of each collective that DeepSpeed calls, from torch 2.13 on
warnings.filterwarnings("ignore", r"`torch.distributed.\w+` is deprecated", FutureWarning)
MOMENTS = ("exp_avg", "exp_avg_sq")


class DeepSpeedEngine(Engine):
    """An engine by DeepSpeed. Weights stay fp32; bf16 is autocast, as with ddp.

    Averages are kept as the weights are: whole up to stage 2, each rank its shards at stage 3.
    """

    def __init__(self, network: nn.Module, config: EngineConfig, optim: OptimConfig) -> None:
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        comm.init_distributed(dist_backend=dist.get_backend())  # takes over the process group that there is
        device = next(network.parameters()).device.type
        self._stage, self._clip = config.zero, optim.clip
        self.network = network
        self.weights = dict(network.named_parameters())
        self._shapes = {name: weight.shape for name, weight in self.weights.items()}
        settings = deepspeed_config(config, optim)
        groups = _groups([*self.weights.values()], settings["zero_optimization"]["allgather_bucket_size"])
        adamw = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay, fused=True)
        self.engine, *_ = deepspeed.initialize(
            model=network, optimizer=adamw, config=settings, dist_init_required=False
        )
        if self._stage == 0:  # it would copy all gradients into one buffer: no key of its configuration cuts that
            self.engine.allreduce_gradients = partial(self.engine.allreduce_gradients, bucket_size=BUCKET)
        self._mesh = init_device_mesh(device, (dist.get_world_size(),))
        self._adamw = self.engine.optimizer.optimizer if self._stage else adamw
        self._share_weights()
        for tensor in self._optimized():
            init_moments(self._adamw, tensor)
        if self._stage in (1, 2):
            for group, flat in zip(self.engine.optimizer.bit16_groups, self._optimized(), strict=True):
                lazy_init_hp_params_optimizer_state(group, flat, self._adamw.state)
        self._kept = {name: weight.ds_tensor if self._stage == 3 else weight for name, weight in self.weights.items()}
        self.averages, self.steps = make_averages(self._kept, optim), 0

    def _optimized(self) -> list[Tensor]:
        """What AdamW is given on this rank: the weights, or flat shards of groups of them."""
        match self._stage:
            case 0:
                return list(self.weights.values())
            case 3:
                return self.engine.optimizer.fp32_partitioned_groups_flat
            case _:
                return self.engine.optimizer.single_partition_of_fp32_groups

    def _share_weights(self) -> None:
        """Let AdamW work on the weights themselves: they are fp32, and need no master copy."""
        if self._stage == 0:
            return
        optimizer = self.engine.optimizer
        if self._stage == 3:
            shards = optimizer.fp16_partitioned_groups_flat
        else:
            shards = [cut[dist.get_rank()] for cut in optimizer.parallel_partitioned_bit16_groups]
        for master, shard in zip(self._optimized(), shards, strict=True):
            if (master.shape, master.device) == (shard.shape, shard.device):  # not offloaded
                master.data = shard.data
        if self._stage < 3:
            optimizer._link_all_hp_params()

    def __call__(self, *inputs: Tensor | int) -> Tensor:
        """The network's forward pass, in the configured precision."""
        return self.engine(*inputs)

    def accumulating(self, last: bool) -> AbstractContextManager:
        """Around forward and backward of a micro-batch. Stages 0 and 1 exchange gradients in the `last` one of a step
        only; stages 2 and 3, which keep no whole gradients, in each."""
        self.engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro-batch's part of the step's loss."""
        self.engine.backward(loss)

    def step(self, lr: float) -> Tensor:
        """Clip, update weights and EMA, clear gradients. Returns the gradient norm before clipping, on the device."""
        for group in self._adamw.param_groups:
            group["lr"] = lr
        if self._stage == 0:  # DeepSpeed would clip as well, but not tell the norm
            norm = nn.utils.clip_grad_norm_(self.weights.values(), self._clip or torch.inf)
        self.engine.step()
        self.update_averages()
        return (
            norm if self._stage == 0 else torch.as_tensor(self.engine.get_global_grad_norm(), device=self.engine.device)
        )

    def drop_gathered(self) -> None:
        """What the network has gathered of its shards must be gathered anew: the shards are others now."""
        if self._stage == 3:
            self.engine.optimizer.empty_partition_cache()  # the engine's also collects all garbage, which takes time

    def state(self) -> dict[str, dict]:
        """model, ema and other averages, and optimizer by parameter name, the same names and shapes with every engine.
        What DeepSpeed cuts in its own way is copied, a parameter at a time, into shards along the first dimension."""
        held = self._held()
        moments = {name: self._moments(name) for name in self.weights}
        if self._stage == 3:
            held = {
                part: {name: self._from_flat(name, flat) for name, flat in tensors.items()}
                for part, tensors in held.items()
            }
        return {**held, "optimizer": {"state": moments}}

    def _held(self) -> dict[str, dict[str, Tensor]]:
        """model and averages as they are on this rank. Detached: without the groups that DeepSpeed hangs on them."""
        parts = {"model": self._kept, **{name: ema.average for name, ema in self.averages.items()}}
        return {part: {name: tensor.detach() for name, tensor in tensors.items()} for part, tensors in parts.items()}

    def _moments(self, name: str) -> dict[str, Tensor]:
        weight = self.weights[name]
        if self._stage == 0:
            return self._adamw.state[weight]
        step = self._adamw.state[self._optimized()[0]]["step"].clone()
        if self._stage == 3:
            parts = {key: self._from_flat(name, safe_get_local_optimizer_state(weight, key)) for key in MOMENTS}
        else:
            parts = {key: self._cut(safe_get_full_optimizer_state(weight, key)) for key in MOMENTS}
        return {"step": step, **parts}

    @torch.no_grad()
    def load_state(self, state: dict[str, dict], steps: int) -> None:
        """Go on after so many steps from a `state()` whose tensors a checkpoint has filled."""
        self.steps = steps
        if self._stage == 0:
            return  # they are our own
        if self._stage == 3:
            for part, tensors in self._held().items():
                for name, flat in tensors.items():
                    flat.copy_(self._to_flat(name, state[part][name]))
        for name, weight in self.weights.items():
            moments = state["optimizer"]["state"][name]
            if self._stage == 3:
                safe_set_local_fp32_param(weight, weight.ds_tensor)
                for key in MOMENTS:
                    safe_set_local_optimizer_state(weight, self._to_flat(name, moments[key]), key)
            else:
                safe_set_full_fp32_param(weight, weight)
                for key in MOMENTS:
                    safe_set_full_optimizer_state(weight, moments[key].full_tensor(), key)
        for tensor in self._optimized():
            self._adamw.state[tensor]["step"].copy_(moments["step"])  # the same for all

    def _cut(self, whole: Tensor) -> DTensor:
        """This rank's rows of a tensor that all ranks have."""
        rows = whole.chunk(dist.get_world_size())
        mine = rows[dist.get_rank()] if dist.get_rank() < len(rows) else whole[:0]
        return DTensor.from_local(
            mine.clone(), self._mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
        )

    def _from_flat(self, name: str, flat: Tensor) -> DTensor:
        """From ZeRO-3's shards, of equal size, the last ones padded, to rows."""
        shape = self._shapes[name]
        padded = flat.new_empty(dist.get_world_size() * flat.numel())
        dist.all_gather_into_tensor(padded, flat.contiguous())
        return self._cut(padded[: shape.numel()].view(shape))

    def _to_flat(self, name: str, rows: DTensor) -> Tensor:
        """The inverse of `_from_flat`."""
        size = self.weights[name].ds_tensor.numel()
        padded = nn.functional.pad(rows.full_tensor().flatten(), (0, size * dist.get_world_size()))
        return padded.narrow(0, size * dist.get_rank(), size)


def _groups(weights: list[Tensor], numbers: int) -> list[dict[str, list[Tensor]]]:
    """AdamW's groups, none much over so many numbers: stages 1 and 2 copy the gradients of a group, and gather its
    weights, at once."""
    groups: list[list[Tensor]] = [[]]
    for weight in weights:
        if sum(map(Tensor.numel, groups[-1])) >= numbers:
            groups.append([])
        groups[-1].append(weight)
    return [{"params": group} for group in groups]
