"""The configuration of engines and of their optimizer."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, field_validator, model_validator

from trainer.engines.power_ema import WIDEST


class EngineConfig(BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True):
    """How the network is distributed over the ranks. None of it changes what is computed, except for rounding.
    `check_engine` (build.py) checks that the settings are compatible."""

    engine: str = Field("fsdp", json_schema_extra={"may_change": True, "keys_of": "trainer.engines.build:ENGINES"})
    """How training is spread over the ranks. single: one process; ddp: a copy of the weights on each rank; fsdp:
    weights sharded over all ranks; hsdp: sharded within copies; deepspeed: DeepSpeed's ZeRO."""
    zero: Literal[0, 1, 2, 3] = Field(2, json_schema_extra={"may_change": True})
    """For deepspeed: what is sharded. 0: nothing; 1: optimizer; 2: gradients too; 3: weights too."""
    shard_size: int | None = Field(None, ge=1, json_schema_extra={"may_change": True})
    """For hsdp: number of ranks that share one copy of the weights. null: those of one machine."""
    offload: bool = Field(False, json_schema_extra={"may_change": True})
    """For fsdp and hsdp: whether weights, gradients, optimizer and EMA are kept in host memory."""
    precision: Literal["fp32", "bf16"] = Field("fp32", json_schema_extra={"sampling": "also"})
    """Precision of layers and attention inside blocks. Weights, tokens, embeddings and the last layer stay fp32."""
    activation_checkpointing: int = Field(0, ge=0, json_schema_extra={"may_change": True})
    """Recompute every k-th block in the backward pass instead of storing its activations. 0: none."""
    compile: bool = Field(False, json_schema_extra={"may_change": True})
    """Whether to compile the network block by block with torch.compile."""
    deepspeed: dict[str, Any] = Field({}, json_schema_extra={"may_change": True})
    """For deepspeed: further keys of DeepSpeed's own configuration."""


Std = Annotated[float, Field(gt=0, lt=WIDEST)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimConfig(BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True):
    """The optimizer, its learning rate over the run, and the averages of its weights."""

    lr: float = Field(1e-4, gt=0, allow_inf_nan=False)
    """Learning rate after the warm-up."""
    warmup: int = Field(0, ge=0)
    """Images over which the learning rate rises from 0 to `lr`. 0: no warm-up."""
    schedule: str = Field("constant", json_schema_extra={"keys_of": "trainer.engines.schedules:SCHEDULES"})
    """The learning rate after the warm-up. constant: `lr`; cosine, linear: falls to `final_lr` over `decay_images`; wsd
    (warm-up, stable, decay): `lr`, and a linear fall over the last `decay_images` of the run."""
    decay_images: int | None = Field(None, ge=1)
    """Images over which the schedule lets the learning rate fall. null: cosine and linear fall until train.images, wsd
    over the last tenth of what follows the warm-up."""
    final_lr: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Learning rate at the end of the fall, and after it."""
    name: str = Field("adamw", json_schema_extra={"keys_of": "trainer.engines.optimizer:OPTIMIZERS"})
    """The optimizer."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """AdamW's decay rates of the first and the second moment, per step."""
    weight_decay: float = Field(0.01, ge=0)
    """AdamW's weight decay."""
    decay: str = Field("all", json_schema_extra={"keys_of": "trainer.engines.optimizer:RULES"})
    """Rule for which parameters decay. all: every parameter; matrices: those of two or more dimensions, but for norms,
    embeddings and class tokens."""
    clip: float | None = Field(3.0, gt=0)
    """Largest norm of the gradient; a larger one is scaled down to it. null: no clipping."""
    ema: tuple[Decay, ...] = Field((0.9999,), min_length=1)
    """Decay per step of the averaged weights. If there are several, the first average makes the samples; the others are
    called ema_<decay>, as in `tools/sample.py --weights ema_0.9996`."""
    power_ema: tuple[Std, ...] = ()
    """Relative standard deviations of further averages for tools/reconstruct_ema.py, like [0.05, 0.1]. []: none."""

    @field_validator("ema", mode="before", json_schema_input_type=Decay | tuple[Decay, ...])
    @classmethod
    def _one_or_more(cls, value: object) -> object:
        return value if isinstance(value, list | tuple) else (value,)

    @model_validator(mode="after")
    def _check(self) -> "OptimConfig":
        if len(set(self.ema)) < len(self.ema):
            raise ValueError(f"ema={list(self.ema)}: two averages of one decay are the same; give each once")
        return self
