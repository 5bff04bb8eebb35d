"""What the config says of checkpoints and of resuming."""

from typing import Literal

from pydantic import BaseModel, Field


class CheckpointConfig(BaseModel, extra="forbid", frozen=True):
    """When checkpoints are written (besides at the end) and which stay."""

    every: int = Field(1_280_000, ge=1)  # images
    keep: int = Field(3, ge=1)  # the newest ones
    keep_every: int = Field(0, ge=0)  # also, for good, the first one after each multiple of so many images; 0: none
    keep_best: Literal["loss"] | None = None  # also the one with the lowest mean loss since the one before
    snapshot_every: int = Field(0, ge=0)  # images between two snapshots of optim.power_ema, which all stay; 0: none
    asynchronous: bool = True  # written while training goes on, from a copy in host memory


class ResumeConfig(BaseModel, extra="forbid", frozen=True):
    """How a run continues."""

    fallback: bool = False  # from the checkpoint before, where the newest is damaged; else that is an error
