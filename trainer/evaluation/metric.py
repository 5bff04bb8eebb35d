"""What a metric is: the statistics of images that it needs, and a number computed from them.

A new metric is one file with its formula, and a line in `METRICS` (trainer/evaluation/metrics.py). What it needs to
know about a set of images is a `Statistic`: from trainer/evaluation/accumulators.py, or its own.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from trainer.ranks import Ranks

Arrays = tuple[np.ndarray, ...]
Side = Mapping[str, Arrays]  # for one set of images: the value of each statistic, by name


class Accumulator(Protocol):
    """A statistic of any number of images, accumulated batch by batch and over ranks."""

    def add(self, values: Tensor, numbers: Tensor) -> None:
        """Add an output (n, d) of the detector for the images `numbers` (n,), which ascend."""
        ...

    def reduce(self, ranks: Ranks) -> None:
        """Combine the statistics of all ranks, at least on rank 0. All ranks call it, once."""
        ...

    def value(self) -> Arrays:
        """Return the statistic of everything that was added."""
        ...


class Statistic(NamedTuple):
    """`make(d, images, device)` returns an accumulator for the detector's `output` ("features", "spatial",
    "probabilities", or "pixels": the uint8 images themselves) of width d. `arrays` names the arrays of its value in
    .npz files."""

    name: str
    output: str
    make: Callable[[int, int, torch.device], Accumulator]
    arrays: tuple[str, ...]


class Metric(NamedTuple):
    """`compute(generated, real, device)` returns the metric from the statistics that it `needs` of the generated images
    and of the real ones: `of_real` (None: the same; (): none, it compares nothing). `kinds` of detectors offer it,
    where they have the outputs: "torchscript", "dinov2", and "classifier", the small one of
    trainer/evaluation/classifier.py, which has moments and samples of features alone. One that is `grouped` is only of
    images generated in groups: generated["groups"] is then trainer/evaluation/groups.py's Groups."""

    name: str
    needs: tuple[Statistic, ...]
    kinds: frozenset[str]
    compute: Callable[[Side, Side, torch.device], float]
    of_real: tuple[Statistic, ...] | None = None
    grouped: bool = False

    @property
    def compares(self) -> tuple[Statistic, ...]:
        """Return the statistics of the real images that it needs."""
        return self.needs if self.of_real is None else self.of_real
