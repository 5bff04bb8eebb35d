"""The denoising loss: the same for images alone and in groups (method: summed over the group, averaged over images)."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from models.backbones.embeddings import NULL_LABEL
from models.paths.base import NoisePath


class NoisyImages(Protocol):
    """What the loss needs of a batch of B images in groups of `group_size`, each group contiguous."""

    x: Tensor  # (B, C, H, W), clean
    noise: Tensor  # (B, C, H, W)
    u: Tensor  # (B,) in [0, 1]: quantiles of the path's distribution of timesteps
    label: Tensor  # (B,)
    slot: Tensor  # (B,)
    conditional: Tensor  # (B,) bool; an image that is not gets the null label
    group_size: int
    grouped: int | None  # the first so many share attention in their groups; None: all
    position: int  # images seen before the step


def denoising_loss(network: Callable[..., Tensor], path: NoisePath, batch: NoisyImages) -> Tensor:
    """The path's loss of each image, (B,), in fp32."""
    t = path.timestep(batch.u, batch.position)
    x_t = path.noisy(batch.x, batch.noise, t)
    label = batch.label.masked_fill(~batch.conditional, NULL_LABEL)
    prediction = network(x_t, t, label, batch.slot, batch.group_size, batch.grouped)
    return path.loss(prediction.float(), batch.x, batch.noise, x_t, t)
