"""Settings of checkpoints and of resuming."""

from typing import Literal

from pydantic import BaseModel, Field


class CheckpointConfig(
    BaseModel,
    extra="forbid",
    frozen=True,
    use_attribute_docstrings=True,
    json_schema_extra={"may_change": True, "affects_results": False},
):
    """When checkpoints are written (besides at the end) and which are kept."""

    every: int = Field(1_280_000, ge=1)
    """Images between two checkpoints."""
    keep: int = Field(3, ge=1)
    """Number of newest checkpoints to keep."""
    keep_every: int = Field(0, ge=0)
    """Also keep forever the first checkpoint after each multiple of this many images. 0: none."""
    keep_best: Literal["loss"] | None = None
    """Also keep the checkpoint with the lowest mean loss since the one before it. null: do not."""
    snapshot_every: int = Field(0, ge=0)
    """Images between two snapshots of the averages of optim.power_ema, all of which are kept. 0: none."""
    asynchronous: bool = True
    """Whether to write while training continues, from a copy in host memory."""


class ResumeConfig(
    BaseModel,
    extra="forbid",
    frozen=True,
    use_attribute_docstrings=True,
    json_schema_extra={"may_change": True, "affects_results": False},
):
    """How a run resumes."""

    fallback: bool = False
    """Whether to resume from the previous checkpoint if the newest one is damaged; otherwise that is an error."""
