"""The engine built on the DeepSpeed library, which takes seconds to import: `zero` imports it when it is needed."""

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from trainer.engines.base import Engine, Shards, head_weights
from trainer.engines.config import EngineConfig, OptimConfig
from trainer.engines.deepspeed_config import deepspeed_config
from trainer.engines.ema import make_averages
from trainer.engines.optimizer import HEADS, Group, parameter_groups, stateless_adamw
from trainer.ranks import Ranks


class _WithHeads(nn.Module):
    """One module for DeepSpeed to distribute. It is called like the network; the caller calls the heads directly."""

    def __init__(self, network: nn.Module, heads: nn.ModuleDict) -> None:
        super().__init__()
        self.network, self.heads = network, heads

    def forward(self, *inputs: Tensor | int | None) -> Tensor:
        """Return the network's prediction."""
        return self.network(*inputs)


class DeepSpeed(Engine):
    """ZeRO stages 0 to 3. Weights stay fp32; bf16 is autocast, as with ddp.

    Averages are kept like the weights: whole up to stage 2, each rank's shards at stage 3.
    """

    options = ("deepspeed",)

    def __init__(
        self, network: nn.Module, heads: nn.ModuleDict, config: EngineConfig, optim: OptimConfig, ranks: Ranks
    ) -> None:
        os.environ["DS_ACCELERATOR"] = ranks.device.type  # otherwise DeepSpeed picks a GPU if there is one, used or not
        os.environ.setdefault("LOCAL_RANK", "0")
        from trainer.engines import zero

        self._device, self._bf16, self._clip = ranks.device, config.precision == "bf16", optim.clip
        self.network = network
        self.weights = dict(network.named_parameters())
        trained = self.weights | head_weights(heads)
        self._shapes = {name: weight.shape for name, weight in trained.items()}
        settings = deepspeed_config(config, optim)
        numbers = settings["zero_optimization"]["allgather_bucket_size"]
        adamw = stateless_adamw(_cut(parameter_groups(trained, optim), numbers), optim)
        model = _WithHeads(network, heads) if len(heads) else network
        self._engine: Any = zero.initialize(model, adamw, settings)
        self._stage = zero.STAGES[config.zero](self._engine, adamw, trained, ranks)
        kept = self._stage.kept()
        self._kept = {name: kept[name] for name in self.weights}
        self._kept_heads = {name: kept[f"{HEADS}.{name}"] for name, _ in heads.named_parameters()}
        self.averages = make_averages(self._kept, optim)

    @classmethod
    def check(cls, config: EngineConfig, optim: OptimConfig) -> None:
        """Raise ValueError for an optimizer other than AdamW, or settings that DeepSpeed cannot handle."""
        if optim.name != "adamw":
            raise ValueError(f"optim.name={optim.name}: not with engine=deepspeed; set adamw, or engine=fsdp")
        if config.compile and config.zero == 3:
            raise ValueError("compile=True: not with zero=3, whose hooks it cannot trace; set zero=2 or engine=fsdp")
        deepspeed_config(config, optim)

    @classmethod
    def check_ranks(cls, config: EngineConfig, world_size: int) -> None:
        """Accept any number."""

    @classmethod
    def shards(cls, config: EngineConfig, world_size: int) -> Shards:
        """Share what the stage shards: moments from stage 1, gradients from stage 2, weights at stage 3."""
        return Shards(*(world_size if config.zero >= stage else 1 for stage in (3, 2, 1)))

    def __call__(self, *inputs: Tensor | int | None) -> Tensor:
        """Return the network's prediction, computed in the configured precision."""
        return self._engine(*inputs)

    def autocast(self) -> AbstractContextManager:
        """Compute matrix products in the configured precision."""
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16)

    def accumulating(self, last: bool) -> AbstractContextManager:
        """Surround a micro-batch. Stages 0 and 1 exchange gradients in the `last` one of a step only; stages 2 and 3,
        which keep no whole gradients, in each."""
        self._engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro-batch's part of the step's loss."""
        self._engine.backward(loss)

    def step(self, lr: float) -> Tensor:
        """Clip the gradient, update weights and averages, clear the gradient. Return its norm before clipping."""
        for group in self._stage.adamw.param_groups:
            group["lr"] = lr
        norm = self._stage.step(self._clip)
        self.update_averages()
        return norm

    def reshard(self) -> None:
        """Free what stage 3 has gathered of the weights."""
        self._stage.reshard()

    def state(self) -> dict[str, dict]:
        """Return the state by name. What DeepSpeed shards in its own way is copied, one parameter at a time, into
        shards along the first dimension."""
        moments = {name: self._stage.moments(name) for name in self._shapes}
        parts = {
            part: {name: self._stage.to_rows(tensor, self._shape(part, name)) for name, tensor in tensors.items()}
            for part, tensors in self._held().items()
        }
        return {**parts, "optimizer": {"state": moments}}

    @torch.no_grad()
    def load_state(self, state: dict[str, dict], steps: int) -> None:
        """Resume after `steps` steps from a `state` whose tensors a checkpoint has filled."""
        self.steps = steps
        for part, tensors in self._held().items():
            for name, tensor in tensors.items():
                self._stage.from_rows(tensor, state[part][name])
        self._stage.load_moments(state["optimizer"]["state"])

    def _held(self) -> dict[str, dict[str, Tensor]]:
        """Return model, heads and averages as this rank holds them, without what DeepSpeed attaches to parameters."""
        heads = {HEADS: self._kept_heads} if self._kept_heads else {}
        parts = {"model": self._kept, **heads, **{name: ema.average for name, ema in self.averages.items()}}
        return {part: {name: tensor.detach() for name, tensor in tensors.items()} for part, tensors in parts.items()}

    def _shape(self, part: str, name: str) -> torch.Size:
        return self._shapes[f"{HEADS}.{name}" if part == HEADS else name]


def _cut(groups: list[Group], numbers: int) -> list[Group]:
    """Split AdamW's groups so that none has many more than `numbers` numbers: stages 1 and 2 copy the gradients of a
    whole group, and gather its weights, at once."""
    small: list[Group] = []
    for group in groups:
        small.append({**group, "params": []})
        for weight in group["params"]:
            if sum(map(Tensor.numel, small[-1]["params"])) >= numbers:
                small.append({**group, "params": []})
            small[-1]["params"].append(weight)
    return small
