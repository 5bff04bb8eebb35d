"""Metrics of a set of images in the features of a detector (FID and the like): one record per evaluation."""

import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from trainer.errors import NOT_LOADED, RunError, first_line
from trainer.evaluation.accumulators import MOMENTS, SPATIAL
from trainer.evaluation.detector import Detector, load_detector
from trainer.evaluation.frechet import warn_if_few
from trainer.evaluation.groups import GROUPS, Groups, read_groups
from trainer.evaluation.image_sets import ARRAY, ImageSet, open_image_set
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
    """Call make_evaluator for one set of images in a file or folder; the record names it. They are in groups if
    samples.json beside them says so."""
    samples = open_image_set(images)
    if len(samples) <= NEIGHBOURS:
        raise RunError(f"{images}: {len(samples)} images; give more than {NEIGHBOURS}")
    groups = read_groups(images, samples)
    record = make_evaluator(detector, samples.shape, reference, metrics, ranks, groups, cache, progress)(samples)
    return record and record | {"images": {"path": str(images), **record["images"]}}


def make_evaluator(
    detector: Detector,
    shape: tuple[int, int, int],
    reference: Path,
    metrics: list[str] | None,
    ranks: Ranks,
    groups: Groups | None = None,
    cache: Path | None = None,
    progress: Callable[[int], object] = lambda number: None,
) -> Callable[[ImageSet], dict | None]:
    """Return a function that takes more than 3 images of `shape` (H, W, C), in these groups, and returns, on rank 0,
    the record of one evaluation: `metrics` (None: all that the detector offers and the reference allows), and what two
    records must share to be compared. All ranks call both. Raise RunError if a metric is not offered, or an image, the
    reference or the detector has the wrong form.
    """
    widths = {name: value.shape[1] for name, value in detect(detector, np.zeros((1, *shape), np.uint8), ranks).items()}
    chosen = _choose(metrics, detector, set(widths), groups)
    height, width, _ = shape
    if height != width and reference.is_dir():
        raise RunError(f"--reference {reference}: images are cropped to squares, those to measure are {width}x{height}")
    compared = Reference(reference, height, detector, widths, cache)
    chosen = _allowed(chosen, compared, metrics, ranks)
    needed = {one for metric in chosen.values() for one in metric.compares}
    real, source = compared.statistics(needed, ranks, progress)
    for number in (source["images"], source.get("features")):
        if number is not None and number <= NEIGHBOURS:
            raise RunError(f"--reference {reference}: {number} images; give more than {NEIGHBOURS}")

    def evaluate(samples: ImageSet) -> dict | None:
        wanted = {one for metric in chosen.values() for one in metric.needs}
        generated = compute_statistics(detector, samples, wanted, ranks, progress)
        if ranks.rank:
            return None
        _warn_if_few(chosen, generated, {len(samples), real.images or len(samples)})
        ours = {**generated.values, GROUPS: groups} if groups else generated.values
        return {
            **{name: one.compute(ours, real.values, ranks.device) for name, one in chosen.items()},
            "images": {"images": len(samples), **({"groups": int(groups.group[-1]) + 1} if groups else {})},
            "reference": source,
            "detector": {"name": detector.name, "kind": detector.kind, "sha256": detector.sha256},
            "version": {"group-diffusion": version("group-diffusion"), "torch": torch.__version__},
        }

    return evaluate


def _choose(names: list[str] | None, detector: Detector, outputs: set[str], groups: Groups | None) -> dict[str, Metric]:
    there = offered(detector.kind, outputs, groups is not None)
    for name in names or []:
        if name in METRICS and METRICS[name].grouped and not groups:
            raise RunError(
                f"--metrics {name}: the images are in no groups, or no samples.json beside them says so; leave it out"
            )
        if name not in there:
            raise RunError(f"--metrics {name}: {detector.name} offers {', '.join(there)}; leave it out")
    return {name: METRICS[name] for name in names or there}


def _allowed(
    chosen: dict[str, Metric], reference: Reference, names: list[str] | None, ranks: Ranks
) -> dict[str, Metric]:
    """Return the metrics that a reference allows, which may be statistics without images. Warn if that leaves out some;
    raise RunError if they were asked for by `names`, or none is left."""
    allowed = {name: one for name, one in chosen.items() if reference.gives(one.compares)}
    if len(allowed) == len(chosen):
        return chosen
    left_out = ", ".join(name for name in chosen if name not in allowed)
    found = f"{reference.path}: no {ARRAY} in it, only {reference.names}"
    if names or not any(one.compares for one in allowed.values()):
        raise RunError(f"{found}, and {left_out} need more; give a reference of images")
    if ranks.rank == 0:
        warnings.warn(f"{found}: without images {left_out} are left out", stacklevel=3)
    return allowed


def _warn_if_few(metrics: dict[str, Metric], generated: Statistics, numbers: set[int]) -> None:
    """Warn for each Frechet distance, which needs moments, if one of the `numbers` of images is too small."""
    for moments in (one for metric in metrics.values() for one in metric.needs if one in (MOMENTS, SPATIAL)):
        for images in numbers:
            warn_if_few(images, len(generated.values[moments.name][0]))
