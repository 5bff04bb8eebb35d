"""A batch: a pure function of (config, image numbers, stream position)."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from data.batches.plan import GroupsConfig
from data.randomness import Stream, draw
from data.sets.registry import Images


@dataclass(frozen=True)
class MicroBatch:
    """Where a batch is in the stream: images (b,) at positions `position`, `position` + 1, ... , of one kind."""

    position: int
    images: np.ndarray
    grouped: bool
    fallbacks: int = 0  # groups that the query could not fill


@dataclass(frozen=True)
class Batch:
    """B images in groups of `group_size`, each contiguous; all of one kind, so it is one call of the network."""

    x: Tensor  # (B, C, H, W) clean: latents, or pixels in [-1, 1]
    noise: Tensor  # (B, C, H, W) standard normal
    t: Tensor  # (B,) in [0, 1]: shares of a distribution of timesteps, which the path knows
    label: Tensor  # (B,) class numbers
    slot: Tensor  # (B,) rows of the sample embedding
    conditional: Tensor  # (B,) bool
    group_size: int
    grouped: bool  # of the group kind, also where groups are of one image
    fallbacks: int = 0  # groups that the query could not fill
    sharing: int | None = None  # the first so many, whole groups, share attention in their groups; None: all

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return Batch(**{name: change(v) if isinstance(v, Tensor) else v for name, v in values.items()})

    def pin_memory(self) -> "Batch":
        """In page-locked memory, so that copies to a GPU can overlap with its work; the loader calls it."""
        return self._map(Tensor.pin_memory)

    def to(self, device: torch.device) -> "Batch":
        """On a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))


def make_batch(
    images: Images,
    config: GroupsConfig,
    max_group_size: int,
    seed: int,
    micro: MicroBatch,
    in_window: Callable[[Tensor], Tensor] | None = None,
) -> Batch:
    """Draws each image's noise, timestep, slot and dropping of its class from the generator of its own position;
    what is common to a group comes from its first image's.

    `in_window` tells of timesteps (n,) whether groups share attention there. Those that do come first in the batch; a
    group goes by its first image.
    """
    size = config.size if micro.grouped else 1
    number = len(micro.images)
    positions = np.arange(micro.position, micro.position + number)
    random = images.posterior, images.mirrored
    drawn = draw(seed, Stream.TRAINING, positions, images.shape, size, max_group_size, *random)
    base, offset, drop = drawn.uniform.T
    first = np.arange(number) // size * size
    t = spread_timesteps(base[first], np.where(first == np.arange(number), 0.5, offset), config.spread)
    dropped = np.full(number, micro.grouped) if config.variant == "light" else drop[first] < config.drop
    batch = Batch(
        x=images.read(micro.images, drawn),
        noise=torch.from_numpy(drawn.noise),
        t=torch.from_numpy(t.astype(np.float32)),
        label=torch.from_numpy(images.label[micro.images]),
        slot=torch.from_numpy(drawn.slot),
        conditional=torch.from_numpy(~dropped),
        group_size=size,
        grouped=micro.grouped,
        fallbacks=micro.fallbacks,
    )
    return _sharing_first(batch, in_window(batch.t[::size])) if in_window and micro.grouped else batch


def _sharing_first(batch: Batch, sharing: Tensor) -> Batch:
    """The groups for which it holds, (groups,) bool, before the others."""
    order = torch.argsort(~sharing, stable=True)[:, None] * batch.group_size + torch.arange(batch.group_size)
    return replace(batch._map(lambda tensor: tensor[order.ravel()]), sharing=int(sharing.sum()) * batch.group_size)


def spread_timesteps(base: np.ndarray, uniform: np.ndarray, spread: float) -> np.ndarray:
    """base + (2 uniform - 1) * spread, reflected at 0 and 1: for uniform `base` every timestep stays uniform
    (cutting off instead would heap timesteps up at both ends)."""
    t = np.abs(base + (2 * uniform - 1) * spread)
    return np.where(t > 1, 2 - t, t)
