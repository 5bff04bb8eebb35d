"""What the metrics need to know of a set of images: features and class probabilities by a detector, over the ranks."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from trainer.errors import RunError, first_line
from trainer.evaluation.detector import Detector, Outputs
from trainer.evaluation.frechet import Moments
from trainer.evaluation.image_sets import ImageSet, read_ahead
from trainer.evaluation.metrics import InceptionScore
from trainer.ranks import Ranks

BATCH = 64  # images a call of the detector; the same ones on any number of ranks
OUTPUT_OF = {"moments": "features", "features": "features", "spatial": "spatial", "inception_score": "probabilities"}


@dataclass(frozen=True)
class Statistics:
    """Of a set of images: mean and covariance of features, the same of spatial features, the Inception Score, and
    features (m, d) float32 of m of them. None where not wanted, or, for `features`, on ranks other than 0."""

    images: int | None  # None: not known
    moments: tuple[np.ndarray, np.ndarray] | None = None
    spatial: tuple[np.ndarray, np.ndarray] | None = None
    inception_score: float | None = None
    features: np.ndarray | None = None


def compute_statistics(
    detector: Detector,
    images: ImageSet,
    wanted: set[str],
    ranks: Ranks,
    most_features: int | None = None,
    progress: Callable[[int], object] = lambda number: None,
) -> Statistics:
    """The fields of Statistics that are `wanted`, of all images. All ranks call it; each takes successive batches.

    Memory does not grow with the number of images, but for `features`: all, or `most_features` at equal intervals.
    RunError on all ranks if an image cannot be read, or the detector offers something else.
    """
    number, device = len(images), ranks.device
    batches = np.linspace(0, -(-number // BATCH), ranks.world_size + 1).astype(int)
    bounds = np.minimum(batches * BATCH, number)  # between the images of the ranks
    first, last = bounds[ranks.rank : ranks.rank + 2].tolist()
    mine = [(start, min(start + BATCH, last)) for start in range(first, last, BATCH)]
    widths = {name: value.shape[1] for name, value in detect(detector, images.read(0, 1), ranks).items()}
    found = {
        name: InceptionScore(widths["probabilities"], number, device)
        if name == "inception_score"
        else Moments(widths[OUTPUT_OF[name]], device)
        for name in sorted(wanted - {"features"})
    }
    kept = np.arange(number)
    if most_features and number > most_features:
        kept = np.linspace(0, number - 1, most_features).astype(int)
    kept = kept if "features" in wanted else kept[:0]
    places = np.searchsorted(kept, bounds)  # between the features of the ranks; rank 0 will have them all
    own = places[-1] if ranks.rank == 0 else places[ranks.rank + 1] - places[ranks.rank]
    features = torch.empty(int(own), widths["features"])

    filled, failure = 0, None
    try:
        for (start, stop), pixels in zip(mine, read_ahead(images, mine), strict=True):
            outputs = detect(detector, pixels, ranks)
            for name, statistic in found.items():
                if name == "inception_score":
                    statistic.add(outputs["probabilities"], torch.arange(start, stop))
                else:
                    statistic.add(outputs[OUTPUT_OF[name]])
            low, high = np.searchsorted(kept, (start, stop))
            features[filled : filled + high - low] = outputs["features"][torch.from_numpy(kept[low:high] - start)].cpu()
            filled += high - low
            progress(stop - start)
    except RunError as error:
        failure = str(error)
    _raise_together(failure, ranks)
    if ranks.world_size > 1:
        for statistic in found.values():
            statistic.reduce()
        _to_rank_0(features, places, ranks)
    return Statistics(
        number,
        **{
            name: statistic.value() if name == "inception_score" else statistic.mean_and_covariance()
            for name, statistic in found.items()
        },
        features=features.numpy() if "features" in wanted and ranks.rank == 0 else None,
    )


def detect(detector: Detector, pixels: np.ndarray, ranks: Ranks) -> Outputs:
    """The detector's outputs of uint8 images (n, H, W, C), on this rank's device. RunError if it gives none."""
    x = torch.from_numpy(pixels).movedim(3, 1).to(ranks.device, non_blocking=True)
    try:
        return detector(x)
    except (RuntimeError, ValueError) as error:
        raise RunError(
            f"--detector {detector.name}: cannot be used: {first_line(error)}; give inception-2015-12-05.pt,"
            " another TorchScript file from uint8 images (n, 3, H, W) to features (n, d), or DINOv2"
        ) from None


def _raise_together(failure: str | None, ranks: Ranks) -> None:
    failures: list = [failure]
    if ranks.world_size > 1:
        failures = [None] * ranks.world_size
        dist.all_gather_object(failures, failure)
    for each in failures:
        if each:
            raise RunError(each)


def _to_rank_0(features: torch.Tensor, places: np.ndarray, ranks: Ranks) -> None:
    for rank in range(1, ranks.world_size):
        start, stop = places[rank : rank + 2]
        if stop > start and ranks.rank == 0:
            dist.recv(features[start:stop], rank)
        elif stop > start and ranks.rank == rank:
            dist.send(features, 0)
