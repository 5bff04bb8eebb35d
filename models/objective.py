"""The denoising loss: the same for images alone and in groups (method: summed over the group, averaged over images)."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from models.embeddings import NULL_LABEL
from models.paths import Path


class NoisyImages(Protocol):
    """What the loss needs of a batch of B images in groups of `group_size`, each group contiguous."""

    x: Tensor  # (B, C, H, W), clean
    noise: Tensor  # (B, C, H, W)
    t: Tensor  # (B,)
    label: Tensor  # (B,)
    slot: Tensor  # (B,)
    conditional: Tensor  # (B,) bool; an image that is not gets the null label
    group_size: int


def denoising_loss(network: Callable[..., Tensor], path: Path, batch: NoisyImages) -> Tensor:
    """Mean squared error of each image's prediction, (B,), in fp32."""
    x_t = path.noisy(batch.x, batch.noise, batch.t)
    label = batch.label.masked_fill(~batch.conditional, NULL_LABEL)
    prediction = network(x_t, batch.t, label, batch.slot, batch.group_size)
    target = path.target(batch.x, batch.noise, batch.t)
    return (prediction.float() - target).square().flatten(1).mean(dim=1)
