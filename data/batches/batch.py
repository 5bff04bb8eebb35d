"""A batch: a pure function of (config, image numbers, stream position)."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.batches.plan import GroupsConfig
from data.batches.pool import Pool
from data.randomness import Purpose, draw

InWindow = Callable[[Tensor, int], Tensor]  # (quantiles of time (n,), position) -> whether groups share, (n,) bool


@dataclass(frozen=True)
class MicroBatch:
    """A batch's place in the stream: images (b,), all in groups or all single, at positions `position`,
    `position` + 1, ..., in a step before which `step_position` images have been seen."""

    position: int
    images: np.ndarray
    in_groups: bool
    fallbacks: int = 0  # groups that the query could not fill
    step_position: int = 0


@dataclass(frozen=True)
class Batch:
    """B images in contiguous groups of `group_size`; all in groups or all single, so one network call handles them."""

    x: Tensor  # (B, C, H, W) clean: latents, or pixels in [-1, 1]
    noise: Tensor  # (B, C, H, W) standard normal
    u: Tensor  # (B,) in [0, 1]: quantiles of time, which the path maps to timesteps
    label: Tensor  # (B,) class numbers
    slot: Tensor  # (B,) rows of the sample embedding
    conditional: Tensor  # (B,) bool
    group_size: int
    in_groups: bool  # true for groups, even groups of one image
    fallbacks: int = 0  # groups that the query could not fill
    grouped: int | None = None  # how many images, from the first, share attention in their (whole) groups; None: all
    position: int = 0  # images seen before its step: the same on all ranks and in all micro-batches of a step
    extra: dict[str, Tensor] = field(default_factory=dict)  # (B, ...) each: what loss terms ask for

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        changed: dict[str, Any] = {"extra": {name: change(tensor) for name, tensor in self.extra.items()}}
        for name in (each.name for each in fields(self)):
            if isinstance(value := getattr(self, name), Tensor):
                changed[name] = change(value)
        return replace(self, **changed)

    def pin_memory(self) -> "Batch":
        """Return the batch in page-locked memory, so that copies to a GPU overlap with computation. The loader calls
        this."""
        return self._map(Tensor.pin_memory)

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))


def make_batch(
    images: Pool,
    config: GroupsConfig,
    max_group_size: int,
    seed: int,
    micro: MicroBatch,
    in_window: InWindow | None = None,
    extra: tuple[str, ...] = (),
) -> Batch:
    """Return the batch of `micro`. Each image's noise, time, slot and class dropping come from the generator of its own
    position; what a group has in common comes from that of its first image.

    `in_window` tells whether a group shares attention, given the time of its first image. Groups that do come first in
    the batch. `extra` names the extra tensors of the images to read.
    """
    size = config.size if micro.in_groups else 1
    number = len(micro.images)
    positions = np.arange(micro.position, micro.position + number)
    random = images.posterior, images.mirrored
    drawn = draw(seed, Purpose.TRAINING, positions, images.shape, size, max_group_size, *random)
    base, offset, drop = drawn.uniform.T
    first = np.arange(number) // size * size
    u = spread_quantiles(base[first], np.where(first == np.arange(number), 0.5, offset), config.spread)
    dropped = np.full(number, micro.in_groups) if config.variant == "light" else drop[first] < config.drop
    batch = Batch(
        x=images.read(micro.images, drawn),
        noise=torch.from_numpy(drawn.noise),
        u=torch.from_numpy(u.astype(np.float32)),
        label=torch.from_numpy(images.label[micro.images]),
        slot=torch.from_numpy(drawn.slot),
        conditional=torch.from_numpy(~dropped),
        group_size=size,
        in_groups=micro.in_groups,
        fallbacks=micro.fallbacks,
        position=micro.step_position,
        extra=images.read_extra(micro.images, drawn, extra) if extra else {},
    )
    if not (in_window and micro.in_groups):
        return batch
    return _sharing_first(batch, in_window(batch.u[::size], batch.position))


def _sharing_first(batch: Batch, sharing: Tensor) -> Batch:
    """Put the groups that share attention, by `sharing` (groups,) bool, before the others."""
    order = torch.argsort(~sharing, stable=True)[:, None] * batch.group_size + torch.arange(batch.group_size)
    return replace(batch._map(lambda tensor: tensor[order.ravel()]), grouped=int(sharing.sum()) * batch.group_size)


def spread_quantiles(base: np.ndarray, uniform: np.ndarray, spread: float) -> np.ndarray:
    """Return base + (2 uniform - 1) * spread, reflected at 0 and 1: if `base` is uniform, so is every quantile
    (clipping would pile them up at both ends)."""
    u = np.abs(base + (2 * uniform - 1) * spread)
    return np.where(u > 1, 2 - u, u)
