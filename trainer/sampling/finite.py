"""Samples that are not finite: they would become black pixels, and be measured as if they were images."""

import numpy as np

from models.sampling.generation import SampleConfig, Sampled
from models.sampling.registry import SAMPLERS


def not_finite(sampled: Sampled, sample: SampleConfig, weights: str, first: int = 0) -> str | None:
    """Return, in one line, which of the images (..., C, H, W), with numbers from `first`, was not finite first, and
    after which step of sampling; None if all are finite. `weights`: what the record calls those of the network."""
    finite = sampled.images.flatten(-3).isfinite().all(dim=-1)
    if finite.all():
        return None
    steps = np.where(
        finite.cpu(), sample.steps, sampled.finite.cpu()
    ).ravel()  # those that spoiled their group come first
    number = int(steps.argmin())
    when = (
        f"in {sample.sampler}"
        if SAMPLERS[sample.sampler].adaptive
        else f"after step {steps[number] + 1} of {sample.steps}"
    )
    return (
        f"weights={weights}: image {first + number} is not finite {when}; sample other weights, or with precision=fp32"
    )
