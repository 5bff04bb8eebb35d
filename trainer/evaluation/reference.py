"""Statistics of the real images that generated ones are compared with: computed once for each detector, and kept."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from data.stores.files import appearing, sha256
from trainer.errors import RunError
from trainer.evaluation.detector import Detector
from trainer.evaluation.image_sets import ARRAY, open_image_set, open_npz
from trainer.evaluation.statistics import Statistics, compute_statistics
from trainer.ranks import Ranks, from_rank_0

CACHE = "reference-statistics"  # a folder beside the reference
MOST_FEATURES = 10_000  # images whose features are kept for KID, precision and recall: as many as ADM's files have


def reference_statistics(
    path: Path,
    side: int | None,
    detector: Detector,
    widths: dict[str, int],
    wanted: set[str],
    ranks: Ranks,
    cache: Path | None = None,
    progress: Callable[[int], object] = lambda number: None,
) -> tuple[Statistics, dict]:
    """(at least the `wanted` statistics, {"path", "sha256", "images"}) of the images at `path`; all ranks call it.

    `path` is a folder of images, which are cropped to `side` pixels, or a file: images (arr_0), or statistics as in
    ADM's files (mu, sigma, and mu_s, sigma_s of spatial features), which may have images beside them. `widths` are
    those of the detector's outputs. RunError if the file's statistics are of another detector.
    """
    stored = _read(path, detector, widths) if path.is_file() else Statistics(None)
    given = {name for name in wanted if getattr(stored, name) is not None}
    if path.is_file() and given == wanted:
        checksum = from_rank_0(lambda: sha256(path))
    else:
        crop = side if path.is_dir() else None
        computed, checksum = _computed(path, crop, detector, widths, ranks, cache, progress)
        stored = replace(computed, **{name: getattr(stored, name) for name in given})
    return stored, {"path": str(path), "sha256": checksum, "images": stored.images}


def _computed(
    path: Path,
    side: int | None,
    detector: Detector,
    widths: dict[str, int],
    ranks: Ranks,
    cache: Path | None,
    progress: Callable[[int], object],
) -> tuple[Statistics, str]:
    """All that this detector gives of these images, from the cache if it has been there before."""
    images = open_image_set(path, side)
    folder = cache or path.absolute().parent / CACHE

    def look() -> tuple[str, bool]:
        checksum = images.checksum()
        file = folder / _name(checksum, side, detector)
        if not file.exists():
            _check_writable(folder)
        return checksum, file.exists()

    checksum, known = from_rank_0(look)
    file = folder / _name(checksum, side, detector)
    if known:
        return _read(file, detector, widths), checksum
    all_of_it = {"moments", "features"} | ({"spatial"} & widths.keys())
    statistics = compute_statistics(detector, images, all_of_it, ranks, MOST_FEATURES, progress)
    if ranks.rank == 0:
        arrays = dict(zip(("mu", "sigma"), statistics.moments, strict=True))
        if statistics.spatial:
            arrays |= dict(zip(("mu_s", "sigma_s"), statistics.spatial, strict=True))
        about = {"images": statistics.images, "detector": detector.sha256, "source": checksum}
        with appearing(file) as opened:
            np.savez(opened, features=statistics.features, **arrays, **about)
    return statistics, checksum


def _name(checksum: str, side: int | None, detector: Detector) -> str:
    return f"{checksum[:16]}-{side or 'as-they-are'}-{detector.sha256[:16]}.npz"


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{folder}: cannot be made: {error.strerror}; give another --cache") from None
    if not os.access(folder, os.W_OK):
        raise RunError(f"{folder}: cannot be written; give another --cache")


def _read(path: Path, detector: Detector, widths: dict[str, int]) -> Statistics:
    """The statistics in a file: ADM's, or one of the cache. RunError if they are of another detector."""
    with open_npz(path) as file:
        if "mu" not in file.files:
            return Statistics(None)
        if "detector" in file.files and str(file["detector"]) != detector.sha256:
            raise RunError(f"{path}: statistics of another detector than {detector.name}; give the images themselves")
        found = {}
        for field, output, suffix in (("moments", "features", ""), ("spatial", "spatial", "_s")):
            names = f"mu{suffix}", f"sigma{suffix}"
            if output in widths and all(name in file.files for name in names):
                mean, covariance = (file[name].astype(np.float64) for name in names)
                width = widths[output]
                if mean.shape != (width,) or covariance.shape != (width, width):
                    raise RunError(
                        f"{path}: {names[0]} {mean.shape}, {names[1]} {covariance.shape}, where {detector.name} gives"
                        f" {width} {output}: statistics of another detector; give the one, or a reference of images"
                    )
                found[field] = mean, covariance
        features = file["features"] if "features" in file.files else None
        images = int(file["images"]) if "images" in file.files else None
        if ARRAY not in file.files and features is None and "moments" not in found:
            raise RunError(f"{path}: neither images ({ARRAY}) nor statistics (mu, sigma); give another reference")
    return Statistics(images, features=features, **found)
