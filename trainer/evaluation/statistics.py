"""Statistics of a set of images, computed by a detector on all ranks."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from data.errors import UserError
from trainer.errors import RunError, first_line
from trainer.evaluation.detector import Detector, Outputs
from trainer.evaluation.image_sets import ImageSet, read_ahead
from trainer.evaluation.metric import Side, Statistic
from trainer.ranks import Ranks

BATCH = 64  # images per detector call; the same ones on any number of ranks


class Statistics(NamedTuple):
    """The value of each statistic by name, over `images` images (None: not known)."""

    images: int | None
    values: Side


def compute_statistics(
    detector: Detector,
    images: ImageSet,
    wanted: Iterable[Statistic],
    ranks: Ranks,
    progress: Callable[[int], object] = lambda number: None,
) -> Statistics:
    """Return the `wanted` statistics of all images, complete on rank 0. All ranks call it; each takes successive
    batches. Raise RunError on all ranks if an image cannot be read, or the detector cannot be used.
    """
    number = len(images)
    batches = np.linspace(0, -(-number // BATCH), ranks.world_size + 1).astype(int)
    first, last = np.minimum(batches * BATCH, number)[ranks.rank : ranks.rank + 2].tolist()
    mine = [(start, min(start + BATCH, last)) for start in range(first, last, BATCH)]
    widths = {name: value.shape[1] for name, value in detect(detector, images.read(0, 1), ranks).items()}
    # in the same order on all ranks, which exchange them one by one
    found = [(one, one.make(widths[one.output], number, ranks.device)) for one in sorted(set(wanted), key=_name)]

    failure = None
    try:
        for (start, stop), pixels in zip(mine, read_ahead(images, mine), strict=True):
            outputs, numbers = detect(detector, pixels, ranks), torch.arange(start, stop)
            for statistic, accumulator in found:
                accumulator.add(outputs[statistic.output], numbers)
            progress(stop - start)
    except UserError as error:
        failure = str(error)
    _raise_together(failure, ranks)
    if ranks.world_size > 1:
        for _, accumulator in found:
            accumulator.reduce(ranks)
    return Statistics(number, {statistic.name: accumulator.value() for statistic, accumulator in found})


def detect(detector: Detector, pixels: np.ndarray, ranks: Ranks) -> Outputs:
    """Return the detector's outputs for uint8 images (n, H, W, C), and the images as "pixels" (n, C H W), on this
    rank's device. Raise RunError if the detector fails."""
    x = torch.from_numpy(pixels).movedim(3, 1).to(ranks.device, non_blocking=True)
    try:
        return {"pixels": x.flatten(1), **detector(x)}
    except (RuntimeError, ValueError) as error:
        raise RunError(
            f"--detector {detector.name}: cannot be used: {first_line(error)}; give inception-2015-12-05.pt,"
            " another TorchScript file from uint8 images (n, 3, H, W) to features (n, d), or DINOv2"
        ) from None


def _name(statistic: Statistic) -> str:
    return statistic.name


def _raise_together(failure: str | None, ranks: Ranks) -> None:
    failures: list = [failure]
    if ranks.world_size > 1:
        failures = [None] * ranks.world_size
        dist.all_gather_object(failures, failure)
    for each in failures:
        if each:
            raise RunError(each)
