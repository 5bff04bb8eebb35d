"""Frechet distance between two sets of features (Heusel et al., arXiv 1706.08500, eq. 6), from their moments."""

import warnings

import numpy as np
import torch

from trainer.evaluation.accumulators import MOMENTS, SPATIAL
from trainer.evaluation.metric import Metric, Side, Statistic


def warn_if_few(images: int, width: int) -> None:
    """Warn if there are too few images for a covariance of full rank: the distance is then far too large."""
    if images <= width:
        warnings.warn(
            f"{images} images for {width} features: their covariance is rank-deficient and the Frechet distance biased"
            f" upwards; use more than {width} images, and compare only with distances of as many",
            stacklevel=2,
        )


def frechet(mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray) -> float:
    """Return |mean_a - mean_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), in float64.

    The trace of the root is the sum of the singular values of S_a^(1/2) S_b^(1/2). If a covariance lacks full rank,
    rounding disturbs these less than the eigenvalues of S_a S_b, whose roots would be needed.
    """
    overlap = np.linalg.svd(_root(cov_a).T @ _root(cov_b), compute_uv=False).sum()
    shift = mean_a - mean_b
    return float(max(shift @ shift + np.trace(cov_a) + np.trace(cov_b) - 2 * overlap, 0.0))


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Return the Frechet distance between features (n, d) and (m, d)."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return frechet(a.mean(axis=0), np.cov(a, rowvar=False), b.mean(axis=0), np.cov(b, rowvar=False))


def _root(covariance: np.ndarray) -> np.ndarray:
    """Return A (d, rank) with A A^T = `covariance`, without eigenvalues that may be mere rounding errors."""
    values, vectors = np.linalg.eigh(covariance)
    kept = values > len(values) * np.finfo(np.float64).eps * values.max(initial=0)
    return vectors[:, kept] * np.sqrt(values[kept])


def _metric(name: str, kind: str, moments: Statistic) -> Metric:
    def compute(generated: Side, real: Side, device: torch.device) -> float:
        return frechet(*generated[moments.name], *real[moments.name])

    return Metric(name, needs=(moments,), kinds=frozenset({kind}), compute=compute)


FID = _metric("fid", "torchscript", MOMENTS)
FD_DINOV2 = _metric("fd_dinov2", "dinov2", MOMENTS)  # EDM2's name
SFID = _metric("sfid", "torchscript", SPATIAL)  # ADM's name
FRECHET = _metric("frechet", "classifier", MOMENTS)
