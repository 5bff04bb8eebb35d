"""The main loss term, denoising: the same for single images and groups (method: summed over the group, averaged over
images)."""

from collections.abc import Callable

from torch import Tensor

from models.objectives.term import Forward, NoisyImages, Term, forward_pass
from models.paths.base import NoisePath


class Denoising(Term):
    """The path's own loss."""

    def __call__(self, forward: Forward, batch: NoisyImages, path: NoisePath) -> Tensor:
        return path.loss(forward.prediction, batch.x, batch.noise, forward.x_t, forward.t)


def denoising_loss(network: Callable[..., Tensor], path: NoisePath, batch: NoisyImages) -> Tensor:
    """Return the path's loss for each image, (B,), in fp32: what a run without other terms minimises."""
    made = forward_pass(network, path, batch)
    return path.loss(made.prediction, batch.x, batch.noise, made.x_t, made.t)
