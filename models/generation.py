"""From noise to images: sampler, guidance and group sizes put together."""

from collections.abc import Callable
from typing import Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from models.guidance import guided_velocity
from models.paths import Path
from models.samplers import SAMPLERS


class SampleConfig(BaseModel, extra="forbid", frozen=True):
    """How images are generated: for every class `per_class` of them, in groups of the larger of C and UC."""

    sampler: Literal[tuple(SAMPLERS)] = "heun"
    steps: int = Field(50, ge=1)
    guidance: float = Field(1.5, ge=0)  # w of u + w (c - u); 1: none
    interval: tuple[float, float] | None = None  # of log-SNR, in which guidance acts; null: everywhere
    cond_group_size: int | None = Field(None, ge=1)  # C; by variant: 1, 1, N
    uncond_group_size: int | None = Field(None, ge=1)  # UC; by variant: 1, N, N
    per_class: int = Field(16, ge=1)
    batch: int = Field(256, ge=1)  # most images at once; at least a group
    seed: int = Field(0, ge=0, lt=2**32)

    @property
    def group_size(self) -> int:
        """Images that are generated together."""
        return max(self.cond_group_size, self.uncond_group_size)

    def for_variant(self, variant: str, size: int) -> "SampleConfig":
        """With C and UC filled in as the variant was trained (arXiv 2512.10954)."""
        c, uc = {"none": (1, 1), "light": (1, size), "full": (size, size)}[variant]
        c, uc = self.cond_group_size or c, self.uncond_group_size or uc
        if max(c, uc) % min(c, uc):
            raise ValueError(f"sample.uncond_group_size={uc}: it and cond_group_size={c} must divide one another")
        if self.interval and self.interval[0] > self.interval[1]:
            raise ValueError(f"sample.interval={list(self.interval)}: lowest log-SNR first")
        return self.model_copy(update={"cond_group_size": c, "uncond_group_size": uc})


@torch.no_grad()
def sample_images(
    network: Callable[..., Tensor], path: Path, config: SampleConfig, noise: Tensor, label: Tensor, slot: Tensor
) -> Tensor:
    """Images (B, C, H, W) from noise of that shape, label (B,) and slot (B,); B is whole groups, each contiguous."""
    velocity = guided_velocity(
        network,
        path,
        label,
        slot,
        config.guidance,
        config.cond_group_size,
        config.uncond_group_size,
        config.interval,
    )
    return SAMPLERS[config.sampler](velocity, noise, config.steps)
