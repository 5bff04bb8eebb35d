"""FID and its kin of a set of images, in the features of a detector: one record for each evaluation."""

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from trainer.errors import NOT_LOADED, RunError, first_line
from trainer.evaluation.detector import Detector, load_detector
from trainer.evaluation.frechet import frechet, warn_if_few
from trainer.evaluation.image_sets import ImageSet, open_image_set
from trainer.evaluation.metrics import NEIGHBOURS, kernel_distance, precision_and_recall
from trainer.evaluation.reference import reference_statistics
from trainer.evaluation.statistics import Statistics, compute_statistics, detect
from trainer.ranks import Ranks

# metric: the field of Statistics that it needs, and the kinds of detector that it has its name from
METRICS = {
    "fid": ("moments", {"torchscript"}),
    "fd_dinov2": ("moments", {"dinov2"}),
    "sfid": ("spatial", {"torchscript"}),
    "is": ("inception_score", {"torchscript"}),
    "kid": ("features", {"torchscript", "dinov2"}),
    "precision": ("features", {"torchscript", "dinov2"}),
    "recall": ("features", {"torchscript", "dinov2"}),
}
NEEDS = {"sfid": "spatial", "is": "probabilities"}  # outputs that not every detector has


def open_detector(name: str, ranks: Ranks) -> Detector:
    """load_detector. RunError if it cannot be loaded."""
    try:
        return load_detector(name, ranks.device)
    except NOT_LOADED as error:
        raise RunError(
            f"--detector {name}: cannot be loaded: {first_line(error)}; give a TorchScript file as"
            " inception-2015-12-05.pt, or DINOv2 as facebook/dinov2-large"
        ) from None


def score(
    detector: Detector,
    images: Path,
    reference: Path,
    metrics: list[str] | None,
    ranks: Ranks,
    cache: Path | None = None,
    progress: Callable[[int], object] = lambda number: None,
) -> dict | None:
    """make_scorer for one set of images, which stand in a file or folder; the record names it."""
    samples = open_image_set(images)
    if len(samples) <= NEIGHBOURS:
        raise RunError(f"{images}: {len(samples)} images; give more than {NEIGHBOURS}")
    record = make_scorer(detector, samples.shape, reference, metrics, ranks, cache, progress)(samples)
    return record and record | {"images": {"path": str(images), **record["images"]}}


def make_scorer(
    detector: Detector,
    shape: tuple[int, int, int],
    reference: Path,
    metrics: list[str] | None,
    ranks: Ranks,
    cache: Path | None = None,
    progress: Callable[[int], object] = lambda number: None,
) -> Callable[[ImageSet], dict | None]:
    """A function of more than 3 images of `shape` (H, W, C) that gives, on rank 0, the record of one evaluation:
    `metrics` (None: all that the detector offers), and what they can be compared by. All ranks call both. RunError if
    an image, the reference or the detector is of a wrong form.
    """
    widths = {name: value.shape[1] for name, value in detect(detector, np.zeros((1, *shape), np.uint8), ranks).items()}
    metrics = _choose(metrics, detector, widths)
    wanted = {METRICS[name][0] for name in metrics}
    height, width, _ = shape
    if height != width and reference.is_dir():
        raise RunError(f"--reference {reference}: images are cropped to squares, those to measure are {width}x{height}")
    real, source = reference_statistics(
        reference, height, detector, widths, wanted - {"inception_score"}, ranks, cache, progress
    )
    if real.images is not None and real.images <= NEIGHBOURS:
        raise RunError(f"--reference {reference}: {real.images} images; give more than {NEIGHBOURS}")

    def measure(samples: ImageSet) -> dict | None:
        made = compute_statistics(detector, samples, wanted, ranks, progress=progress)
        if ranks.rank:
            return None
        return {
            **_values(metrics, made, real, ranks.device),
            "images": {"images": len(samples)},
            "reference": source,
            "detector": {"name": detector.name, "kind": detector.kind, "sha256": detector.sha256},
            "version": {"group-diffusion": version("group-diffusion"), "torch": torch.__version__},
        }

    return measure


def _choose(metrics: list[str] | None, detector: Detector, widths: dict[str, int]) -> list[str]:
    offered = [
        name for name, (_, kinds) in METRICS.items() if detector.kind in kinds and NEEDS.get(name, "features") in widths
    ]
    for name in metrics or []:
        if name not in offered:
            raise RunError(f"--metrics {name}: {detector.name} offers {', '.join(offered)}; leave it out")
    return metrics or offered


def _values(metrics: list[str], made: Statistics, real: Statistics, device: torch.device) -> dict[str, float]:
    values: dict[str, float] = {}
    for name, field in (("fid", "moments"), ("fd_dinov2", "moments"), ("sfid", "spatial")):
        if name in metrics:
            ours, theirs = getattr(made, field), getattr(real, field)
            for images in {made.images, real.images or made.images}:
                warn_if_few(images, len(ours[0]))
            values[name] = frechet(*ours, *theirs)
    if "is" in metrics:
        values["is"] = made.inception_score
    if "kid" in metrics:
        values["kid"] = kernel_distance(made.features, real.features, device=device)
    if {"precision", "recall"} & set(metrics):
        values["precision"], values["recall"] = precision_and_recall(made.features, real.features, device=device)
    return {name: values[name] for name in metrics}
