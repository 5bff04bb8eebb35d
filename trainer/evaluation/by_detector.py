"""Metrics of a set of images in the features of a detector (FID and the like): one record per evaluation."""

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from trainer.errors import NOT_LOADED, RunError, first_line
from trainer.evaluation.accumulators import MOMENTS, SPATIAL
from trainer.evaluation.detector import Detector, load_detector
from trainer.evaluation.frechet import warn_if_few
from trainer.evaluation.image_sets import ImageSet, open_image_set
from trainer.evaluation.metric import Metric
from trainer.evaluation.metrics import METRICS, offered
from trainer.evaluation.precision_recall import NEIGHBOURS
from trainer.evaluation.reference import Reference
from trainer.evaluation.statistics import Statistics, compute_statistics, detect
from trainer.ranks import Ranks


def open_detector(name: str, ranks: Ranks) -> Detector:
    """Return the detector of this name. Raise RunError if it cannot be loaded."""
    try:
        return load_detector(name, ranks.device)
    except NOT_LOADED as error:
        raise RunError(
            f"--detector {name}: cannot be loaded: {first_line(error)}; give a TorchScript file as"
            " inception-2015-12-05.pt, or DINOv2 as facebook/dinov2-large"
        ) from None


def evaluate_images(
    detector: Detector,
    images: Path,
    reference: Path,
    metrics: list[str] | None,
    ranks: Ranks,
    cache: Path | None = None,
    progress: Callable[[int], object] = lambda number: None,
) -> dict | None:
    """Call make_evaluator for one set of images in a file or folder; the record names it."""
    samples = open_image_set(images)
    if len(samples) <= NEIGHBOURS:
        raise RunError(f"{images}: {len(samples)} images; give more than {NEIGHBOURS}")
    record = make_evaluator(detector, samples.shape, reference, metrics, ranks, cache, progress)(samples)
    return record and record | {"images": {"path": str(images), **record["images"]}}


def make_evaluator(
    detector: Detector,
    shape: tuple[int, int, int],
    reference: Path,
    metrics: list[str] | None,
    ranks: Ranks,
    cache: Path | None = None,
    progress: Callable[[int], object] = lambda number: None,
) -> Callable[[ImageSet], dict | None]:
    """Return a function that takes more than 3 images of `shape` (H, W, C) and returns, on rank 0, the record of one
    evaluation: `metrics` (None: all that the detector offers), and what two records must share to be compared. All
    ranks call both. Raise RunError if a metric is not offered, or an image, the reference or the detector has the wrong
    form.
    """
    widths = {name: value.shape[1] for name, value in detect(detector, np.zeros((1, *shape), np.uint8), ranks).items()}
    chosen = _choose(metrics, detector, set(widths))
    height, width, _ = shape
    if height != width and reference.is_dir():
        raise RunError(f"--reference {reference}: images are cropped to squares, those to measure are {width}x{height}")
    needed = {one for metric in chosen.values() if metric.compares for one in metric.needs}
    real, source = Reference(reference, height, detector, widths, cache).statistics(needed, ranks, progress)
    if real.images is not None and real.images <= NEIGHBOURS:
        raise RunError(f"--reference {reference}: {real.images} images; give more than {NEIGHBOURS}")

    def evaluate(samples: ImageSet) -> dict | None:
        wanted = {one for metric in chosen.values() for one in metric.needs}
        generated = compute_statistics(detector, samples, wanted, ranks, progress)
        if ranks.rank:
            return None
        _warn_if_few(chosen, generated, {len(samples), real.images or len(samples)})
        return {
            **{name: one.compute(generated.values, real.values, ranks.device) for name, one in chosen.items()},
            "images": {"images": len(samples)},
            "reference": source,
            "detector": {"name": detector.name, "kind": detector.kind, "sha256": detector.sha256},
            "version": {"group-diffusion": version("group-diffusion"), "torch": torch.__version__},
        }

    return evaluate


def _choose(names: list[str] | None, detector: Detector, outputs: set[str]) -> dict[str, Metric]:
    there = offered(detector.kind, outputs)
    for name in names or []:
        if name not in there:
            raise RunError(f"--metrics {name}: {detector.name} offers {', '.join(there)}; leave it out")
    return {name: METRICS[name] for name in names or there}


def _warn_if_few(metrics: dict[str, Metric], generated: Statistics, numbers: set[int]) -> None:
    """Warn for each Frechet distance, which needs moments, if one of the `numbers` of images is too small."""
    for moments in (one for metric in metrics.values() for one in metric.needs if one in (MOMENTS, SPATIAL)):
        for images in numbers:
            warn_if_few(images, len(generated.values[moments.name][0]))
