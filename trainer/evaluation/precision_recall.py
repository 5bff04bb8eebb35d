"""Precision and recall of generated images (Kynkaanniemi et al., arXiv 1904.06991) from features, in float64.

Distances are computed block by block, so memory grows only linearly with the number of images.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from trainer.evaluation.accumulators import FEATURES
from trainer.evaluation.metric import Metric

NEIGHBOURS = 3  # as in the paper and in ADM's suite; each set needs more images than that
ROWS, COLUMNS = 1024, 4096  # of a block of distances: 32 MB


def precision(
    generated: np.ndarray, real: np.ndarray, k: int = NEIGHBOURS, device: torch.device | None = None
) -> float:
    """Return the share of generated images, given features (n, d) and (m, d), that lie in the ball of a real one, whose
    radius is the distance to its k-th nearest in its own set."""
    a, b = (torch.from_numpy(features).to(device or "cpu") for features in (generated, real))
    radius = _squared_radii(b, k)
    near = torch.zeros(len(a), dtype=torch.bool, device=a.device)
    for rows, columns, squared in _blocks(a, b):
        near[rows] |= (squared <= radius[None, columns]).any(dim=1)
    return float(near.double().mean())


def recall(generated: np.ndarray, real: np.ndarray, k: int = NEIGHBOURS, device: torch.device | None = None) -> float:
    """Return the share of real images that lie in the ball of a generated one; see `precision`."""
    a, b = (torch.from_numpy(features).to(device or "cpu") for features in (generated, real))
    radius = _squared_radii(a, k)
    near = torch.zeros(len(b), dtype=torch.bool, device=b.device)
    for rows, columns, squared in _blocks(a, b):
        near[columns] |= (squared <= radius[rows, None]).any(dim=0)
    return float(near.double().mean())


def _blocks(a: Tensor, b: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield rows of a, columns of b, and the squared distances between them."""
    for i in range(0, len(a), ROWS):
        for j in range(0, len(b), COLUMNS):
            rows, columns = slice(i, i + ROWS), slice(j, j + COLUMNS)
            yield rows, columns, _squared_distances(a[rows], b[columns])


def _squared_radii(x: Tensor, k: int) -> Tensor:
    """Return each vector's squared distance (n,) to its k-th nearest other; each block serves its rows and columns."""
    nearest = torch.full((len(x), k + 1), torch.inf, dtype=torch.float64, device=x.device)  # the vector itself included
    for i in range(0, len(x), ROWS):
        for j in range(i, len(x), COLUMNS):
            rows, columns = slice(i, i + ROWS), slice(max(j, i + ROWS), j + COLUMNS)
            squared = _squared_distances(x[rows], x[j : j + COLUMNS])
            nearest[rows] = _smallest(nearest[rows], squared)
            if columns.start < len(x):
                nearest[columns] = _smallest(nearest[columns], squared[:, columns.start - j :].T)
    return nearest[:, k]


def _smallest(known: Tensor, more: Tensor) -> Tensor:
    """Return the smallest values in each row of both, ascending, as many as `known` has."""
    return torch.cat([known, more], dim=1).topk(known.shape[1], dim=1, largest=False).values


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    a, b = a.double(), b.double()
    return torch.addmm(a.square().sum(1)[:, None] + b.square().sum(1), a, b.T, alpha=-2).clamp_(min=0)


PRECISION, RECALL = (
    Metric(
        function.__name__,
        needs=(FEATURES,),
        kinds=frozenset({"torchscript", "dinov2", "classifier"}),
        compute=lambda generated, real, device, function=function: function(
            *generated[FEATURES.name], *real[FEATURES.name], device=device
        ),
    )
    for function in (precision, recall)
)
