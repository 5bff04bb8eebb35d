"""Samples that are not finite: they would become black pixels, and be measured as if they were images."""

import numpy as np

from models.sampling.generation import SampleConfig, Sampled
from models.sampling.registry import SAMPLERS


def not_finite(sampled: Sampled, sample: SampleConfig, weights: str, first: int = 0) -> str | None:
    """Return, in one line, which of the images (..., C, H, W), latents or decoded, with numbers from `first`, was not
    finite first, and after which step of sampling; None if all are finite. `weights`: the network's, as records call
    them."""
    finite = sampled.images.flatten(-3).isfinite().all(dim=-1)
    if finite.all():
        return None
    # the first by step, then by number: one that spoiled its group comes before the others
    until = np.where(finite.cpu(), sample.steps + 1, sampled.finite.cpu()).ravel()
    number = int(until.argmin())
    if SAMPLERS[sample.sampler].adaptive:
        when = f"in {sample.sampler}"
    elif until[number] == sample.steps:
        when = "once decoded by data.vae"
    else:
        when = f"after step {until[number] + 1} of {sample.steps}"
    image = f"image {first + number} is not finite {when}"
    return f"weights={weights}: {image}; sample other weights, or with precision=fp32"
