"""What the config says of engines and of their optimizer."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

from trainer.engines.power_ema import WIDEST


class EngineConfig(BaseModel, extra="forbid", frozen=True):
    """How the network is laid over the ranks. None of it changes what is computed, but for rounding."""

    engine: Literal["single", "ddp", "fsdp", "hsdp", "deepspeed"] = "fsdp"
    zero: Literal[0, 1, 2, 3] = 2  # of deepspeed: what is sharded; 1: optimizer, 2: gradients too, 3: weights too
    shard_size: int | None = Field(None, ge=1)  # of hsdp: ranks that share one copy; null: those of a machine
    offload: bool = False  # of fsdp, hsdp: weights, gradients, optimizer and EMA rest in the memory of the host
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: of matrix products and activations; weights stay fp32
    activation_checkpointing: int = Field(0, ge=0)  # recompute every k-th block in the backward pass; 0: none
    compile: bool = False  # torch.compile, block by block
    deepspeed: dict[str, Any] = {}  # further keys of DeepSpeed's own configuration

    @model_validator(mode="after")
    def _check_engine(self) -> "EngineConfig":
        wanted = {
            "shard_size": (self.shard_size, ("hsdp",)),
            "offload": (self.offload, ("fsdp", "hsdp")),
            "deepspeed": (self.deepspeed, ("deepspeed",)),
        }
        for name, (value, engines) in wanted.items():
            if value and self.engine not in engines:
                raise ValueError(f"{name}={value}: engine={self.engine} has no such thing; set engine={engines[0]}")
        if self.compile and self.engine == "deepspeed" and self.zero == 3:
            raise ValueError("compile=True: not with zero=3, whose hooks it cannot trace; set zero=2 or engine=fsdp")
        return self


Std = Annotated[float, Field(gt=0, lt=WIDEST)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimConfig(BaseModel, extra="forbid", frozen=True):
    """AdamW with a constant learning rate after a linear warm-up."""

    lr: float = Field(1e-4, gt=0, allow_inf_nan=False)
    warmup: int = Field(0, ge=0)  # images
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    weight_decay: float = Field(0.01, ge=0)
    clip: float | None = Field(3.0, gt=0)  # largest gradient norm; null: no clipping
    ema: float = Field(0.9999, ge=0, lt=1)  # decay per step
    power_ema: tuple[Std, ...] = ()  # further averages, for tools/reconstruct_ema.py: relative stds, as [0.05, 0.1]

    def lr_at(self, position: int) -> float:
        """Learning rate of the step that brings the images seen to `position`."""
        return self.lr * min(1.0, position / self.warmup) if self.warmup else self.lr
