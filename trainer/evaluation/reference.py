"""Statistics of the real images that generated ones are compared with: computed once for each detector, and cached."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from data.stores.files import appearing, sha256
from trainer.errors import RunError
from trainer.evaluation.accumulators import FEATURES, MOMENTS, SPATIAL, FeatureSample
from trainer.evaluation.detector import Detector
from trainer.evaluation.image_sets import ARRAY, open_image_set
from trainer.evaluation.metric import Statistic
from trainer.evaluation.statistics import Statistics, compute_statistics
from trainer.evaluation.statistics_files import names_in, read_statistics
from trainer.ranks import Ranks, from_rank_0

CACHE = "reference-statistics"  # a folder beside the reference
MOST_FEATURES = 10_000  # images whose features are kept for KID, precision and recall, as in ADM's files
SAMPLED = FEATURES._replace(make=lambda width, images, _: FeatureSample(width, images, MOST_FEATURES))


class Reference:
    """The real images at `path`: a folder of images, cropped to `side` pixels, or a file of images (arr_0) or of
    statistics in ADM's format (mu, sigma, and mu_s, sigma_s of spatial features), possibly along with images. `widths`
    are those of the detector's outputs. What is computed is kept in the folder `cache`, or in one beside the reference.
    Raise RunError if a file has the wrong form.
    """

    def __init__(
        self, path: Path, side: int, detector: Detector, widths: dict[str, int], cache: Path | None = None
    ) -> None:
        self.path, self._detector, self._widths = path, detector, widths
        self._side = side if path.is_dir() else None
        self._cache = cache or path.absolute().parent / CACHE
        self._names = names_in(path, detector) if path.is_file() else {ARRAY}

    @property
    def names(self) -> str:
        """Return the names of what is in the file."""
        return ", ".join(sorted(self._names))

    def gives(self, statistics: Iterable[Statistic]) -> bool:
        """Return whether it has these statistics, or images to compute them from."""
        return ARRAY in self._names or all(self._names.issuperset(one.arrays) for one in statistics)

    def statistics(
        self, wanted: Iterable[Statistic], ranks: Ranks, progress: Callable[[int], object] = lambda number: None
    ) -> tuple[Statistics, dict]:
        """Return (at least the `wanted` statistics, where they come from: {"path", "sha256", "images" behind mu and
        sigma (None: the file does not say), "features": images whose features are compared one by one, if any are});
        all ranks call it. Raise RunError if the file's statistics come from another detector, or an image cannot be
        read."""
        wanted = list(wanted)
        stored = self._read(self.path, wanted) if self.path.is_file() else Statistics(None, {})
        if self.path.is_file() and all(statistic.name in stored.values for statistic in wanted):
            checksum = from_rank_0(lambda: sha256(self.path))
        else:
            computed, checksum = self._computed(wanted, ranks, progress)
            images = stored.images if MOMENTS.name in stored.values else computed.images
            stored = Statistics(images, {**computed.values, **stored.values})
        source = {"path": str(self.path), "sha256": checksum, "images": stored.images}
        if FEATURES in wanted:
            source["features"] = len(stored.values[FEATURES.name][0])
        return stored, source

    def _computed(
        self, wanted: list[Statistic], ranks: Ranks, progress: Callable[[int], object]
    ) -> tuple[Statistics, str]:
        """Return all statistics that the detector gives of these images, from the cache if they are there."""
        images = open_image_set(self.path, self._side)

        def look() -> tuple[str, bool]:
            checksum = images.checksum()
            file = self._file(checksum)
            known = file.exists() and self._holds(file, wanted)
            if not known:
                _check_writable(self._cache)
            return checksum, known

        checksum, known = from_rank_0(look)
        file = self._file(checksum)
        if known:
            return self._read(file, wanted), checksum
        standard = {one.name: one for one in (MOMENTS, SPATIAL, SAMPLED) if one.output in self._widths}
        all_of_it = list(({one.name: one for one in wanted} | standard).values())
        statistics = compute_statistics(self._detector, images, all_of_it, ranks, progress)
        if ranks.rank == 0:
            arrays: dict[str, np.ndarray] = {}
            for statistic in all_of_it:
                arrays |= zip(statistic.arrays, statistics.values[statistic.name], strict=True)
            about = {"images": statistics.images, "detector": self._detector.sha256, "source": checksum}
            with appearing(file) as opened:
                np.savez(opened, **arrays, **about)
        return statistics, checksum

    def _read(self, path: Path, wanted: list[Statistic]) -> Statistics:
        return read_statistics(path, wanted, self._detector, self._widths)

    def _file(self, checksum: str) -> Path:
        return self._cache / f"{checksum[:16]}-{self._side or 'as-they-are'}-{self._detector.sha256[:16]}.npz"

    def _holds(self, file: Path, wanted: list[Statistic]) -> bool:
        """Return whether no statistic is missing; one may be if its metric was added later."""
        names = names_in(file, self._detector)
        return all(names.issuperset(statistic.arrays) for statistic in wanted)


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{folder}: cannot be made: {error.strerror}; give another --cache") from None
    if not os.access(folder, os.W_OK):
        raise RunError(f"{folder}: cannot be written; give another --cache")
