"""Files of statistics: ADM's, those of our cache, and others of the same form; each is checked before it is used."""

import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from trainer.errors import RunError
from trainer.evaluation.accumulators import MOMENTS, SPATIAL
from trainer.evaluation.detector import Detector
from trainer.evaluation.image_sets import open_npz
from trainer.evaluation.metric import Arrays, Statistic
from trainer.evaluation.statistics import Statistics

NEGATIVE = 1e-6  # of a covariance's trace: an eigenvalue below minus that is no rounding error, of fp32 neither


def names_in(path: Path, detector: Detector) -> set[str]:
    """Return the names of the arrays in an .npz file. Raise RunError if it is none, or was made by unpickling tools."""
    _refuse_pickles(path, detector)
    with open_npz(path) as file:
        return set(file.files)


def read_statistics(path: Path, wanted: Iterable[Statistic], detector: Detector, widths: dict[str, int]) -> Statistics:
    """Return all moments in the file, those of the `wanted` statistics if it is from our cache, and of how many images
    mu and sigma are (None: it does not say). `widths` are those of the detector's outputs.

    Raise RunError if another detector made them, half of a pair is missing, or a covariance is none.
    """
    with open_npz(path) as file:
        names = set(file.files)
        ours = "detector" in names
        if ours and str(file["detector"]) != detector.sha256:
            raise RunError(f"{path}: statistics of another detector than {detector.name}; give the images themselves")
        values: dict[str, Arrays] = {}
        for statistic in {one.name: one for one in (MOMENTS, SPATIAL, *(wanted if ours else ()))}.values():
            there = [name for name in statistic.arrays if name in names]
            if not there or statistic.output not in widths:
                continue
            if missing := set(statistic.arrays) - set(there):
                raise RunError(f"{path}: {there[0]} without {missing.pop()}; give a file with both, or with neither")
            arrays = tuple(_numbers(path, file, name) for name in statistic.arrays)
            moments = statistic.name in (MOMENTS.name, SPATIAL.name)
            values[statistic.name] = _checked(path, statistic, arrays, detector, widths) if moments else arrays
        number = _numbers(path, file, "images") if "images" in names and MOMENTS.name in values else None
        images = int(number) if number is not None and number.ndim == 0 else None
    return Statistics(images, values)


def _refuse_pickles(path: Path, detector: Detector) -> None:
    """Raise RunError with the command that converts it, if the file is a pickle (edm2) or torch.save's
    (torch-fidelity)."""
    with path.open("rb") as file:
        pickled = file.read(2)[:1] == b"\x80"  # every protocol since 2
    saved = zipfile.is_zipfile(path) and any(name.endswith("data.pkl") for name in zipfile.ZipFile(path).namelist())
    if not pickled and not saved:
        return
    target = path.with_suffix(".npz")
    if saved or path.suffix in (".pt", ".pth"):
        kind, load = "torch-fidelity's", f"import torch; s = torch.load('{path}', weights_only=False)"
        arrays = "**s"
    else:
        kind, load = "edm2's", f"import pickle; s = pickle.load(open('{path}', 'rb'))"
        arrays = f"**s['{'fd_dinov2' if detector.kind == 'dinov2' else 'fid'}'], images=s['num_images']"
    raise RunError(
        f"{path}: a pickle, like {kind} statistics, is not loaded, for it could run any code; if you trust it: python"
        f" -c \"{load}; import numpy; numpy.savez('{target}', {arrays})\", and give {target}"
    )


def _numbers(path: Path, file: np.lib.npyio.NpzFile, name: str) -> np.ndarray:
    """Return an array of finite numbers."""
    try:
        array = file[name]
    except ValueError:  # it is refused without being unpickled
        raise RunError(f"{path}: {name} is an array of objects, which is not loaded; save it as numbers") from None
    if array.dtype.kind not in "fiu":
        raise RunError(f"{path}: {name} is of type {array.dtype}; save it as numbers")
    if not np.isfinite(array).all():
        raise RunError(f"{path}: {name} has values that are not finite; make it again")
    return array


def _checked(
    path: Path, statistic: Statistic, moments: Arrays, detector: Detector, widths: dict[str, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Return mean (d,) and covariance (d, d) as float64."""
    mean, covariance = (array.astype(np.float64) for array in moments)
    (mu, sigma), width = statistic.arrays, widths[statistic.output]
    if mean.shape != (width,) or covariance.shape != (width, width):
        raise RunError(
            f"{path}: {mu} {mean.shape}, {sigma} {covariance.shape}, where {detector.name} gives {width}"
            f" {statistic.output}: statistics of another detector; give the one, or a reference of images"
        )
    rounding = NEGATIVE * max(float(np.trace(covariance)), 0)
    if not np.allclose(covariance, covariance.T, rtol=1e-4, atol=rounding):
        raise RunError(f"{path}: {sigma} is no covariance, because it is not symmetric; make it again")
    if (smallest := np.linalg.eigvalsh(covariance)[0]) < -rounding:
        raise RunError(f"{path}: {sigma} is no covariance, because it has the eigenvalue {smallest:.3g}; make it again")
    return mean, covariance
