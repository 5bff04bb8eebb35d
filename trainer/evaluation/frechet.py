"""Frechet distance between two sets of features (Heusel et al., arXiv 1706.08500, eq. 6), from their moments."""

import warnings

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from trainer.errors import RunError


class Moments:
    """Number, sum and sum of outer products of vectors (d,), in float64: of any number of vectors in one piece of
    memory, added in parts, and over ranks."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.count = 0
        self._sum = torch.zeros(width, dtype=torch.float64, device=device)
        self._outer = torch.zeros(width, width, dtype=torch.float64, device=device)

    def add(self, features: Tensor) -> None:
        """Vectors (n, d)."""
        features = features.to(self._sum)
        self.count += len(features)
        self._sum += features.sum(dim=0)
        self._outer.addmm_(features.T, features)

    def reduce(self) -> None:
        """Make them the moments of the vectors of all ranks. All ranks call it, once."""
        count = torch.tensor(self.count, device=self._sum.device)
        for tensor in (count, self._sum, self._outer):
            dist.all_reduce(tensor)
        self.count = int(count)

    def mean_and_covariance(self) -> tuple[np.ndarray, np.ndarray]:
        """(d,) and (d, d), divided by count - 1. RunError if there are not two vectors."""
        if self.count < 2:
            raise RunError(f"{self.count} images: a covariance needs at least 2; give more")
        mean = self._sum / self.count
        covariance = (self._outer - self.count * torch.outer(mean, mean)) / (self.count - 1)
        return mean.cpu().numpy(), covariance.cpu().numpy()


def warn_if_few(images: int, width: int) -> None:
    """A covariance of too few images has no full rank: the distance is then far too large, and says little."""
    if images <= width:
        warnings.warn(
            f"{images} images for {width} features: their covariance is rank-deficient and the Frechet distance biased"
            f" upwards; use more than {width} images, and compare only with distances of as many",
            stacklevel=2,
        )


def frechet(mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray) -> float:
    """|mean_a - mean_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), in float64.

    The trace of the root is the sum of the singular values of S_a^(1/2) S_b^(1/2), which rounding disturbs less than
    the eigenvalues of S_a S_b, whose roots are needed, where a covariance has no full rank.
    """
    overlap = np.linalg.svd(_root(cov_a).T @ _root(cov_b), compute_uv=False).sum()
    shift = mean_a - mean_b
    return float(max(shift @ shift + np.trace(cov_a) + np.trace(cov_b) - 2 * overlap, 0.0))


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """The same of features (n, d) and (m, d)."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return frechet(a.mean(axis=0), np.cov(a, rowvar=False), b.mean(axis=0), np.cov(b, rowvar=False))


def _root(covariance: np.ndarray) -> np.ndarray:
    """A (d, rank) with A A^T = `covariance`; of eigenvalues that rounding alone may have made, none."""
    values, vectors = np.linalg.eigh(covariance)
    kept = values > len(values) * np.finfo(np.float64).eps * values.max(initial=0)
    return vectors[:, kept] * np.sqrt(values[kept])
