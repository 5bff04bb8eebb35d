"""Measures of generated images by features and class probabilities of a network, in float64: Inception Score, KID, and
precision and recall. (trainer/evaluation/frechet.py has FID.)"""

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

NEIGHBOURS = 3  # of Kynkaanniemi et al. and of ADM's suite
ROWS, COLUMNS = 1024, 4096  # of a block of distances: 32 MB


class InceptionScore:
    """exp of the mean KL(p(y|x) | p(y)), averaged over `splits` parts of the images in their order (Salimans et al.,
    arXiv 1606.03498, sec. 4, and their code); added in parts, and over ranks.

    ADM's parts are of 5,000 images: the same for 50,000.
    """

    def __init__(self, classes: int, images: int, device: torch.device, splits: int = 10) -> None:
        self._first = torch.arange(1, splits, device=device) * images // splits  # of each part but the first
        self._sum = torch.zeros(splits, classes, dtype=torch.float64, device=device)
        self._negentropy = torch.zeros(splits, dtype=torch.float64, device=device)
        self._count = torch.zeros(splits, dtype=torch.float64, device=device)

    def add(self, probabilities: Tensor, numbers: Tensor) -> None:
        """Class probabilities (n, classes) of the images `numbers` (n,)."""
        p = probabilities.to(self._sum)
        part = torch.bucketize(numbers.to(p.device), self._first, right=True)
        self._sum.index_add_(0, part, p)
        self._negentropy.index_add_(0, part, torch.xlogy(p, p).sum(dim=1))
        self._count += torch.bincount(part, minlength=len(self._count))

    def reduce(self) -> None:
        """Make it that of the images of all ranks. All ranks call it, once."""
        for tensor in (self._sum, self._negentropy, self._count):
            dist.all_reduce(tensor)

    def value(self) -> float:
        """The score; parts without images, where there are fewer images than parts, are left out."""
        some = self._count > 0
        count, mean = self._count[some], self._sum[some] / self._count[some, None]
        divergence = self._negentropy[some] / count - torch.xlogy(mean, mean).sum(dim=1)
        return float(divergence.exp().mean())


def kernel_distance(
    a: np.ndarray,
    b: np.ndarray,
    subsets: int = 100,
    size: int = 1000,
    seed: int = 0,
    device: torch.device | None = None,
) -> float:
    """KID (Binkowski et al., arXiv 1801.01401): the unbiased squared MMD of features (n, d) and (m, d) by the kernel
    (x·y/d + 1)^3, averaged over random subsets of `size` vectors of each, or of as many as there are."""
    rng = np.random.default_rng(seed)
    size = min(size, len(a), len(b))
    total = 0.0
    for _ in range(subsets):
        chosen = (f[rng.choice(len(f), size, replace=False)] for f in (a, b))
        x, y = (torch.from_numpy(f).to(device or "cpu").double() for f in chosen)
        xx, yy, xy = ((u @ v.T).div_(u.shape[1]).add_(1).pow_(3) for u, v in ((x, x), (y, y), (x, y)))
        within = sum(k.sum() - k.trace() for k in (xx, yy)) / (size * (size - 1))
        total += float(within - 2 * xy.mean())
    return total / subsets


def precision_and_recall(
    generated: np.ndarray, reference: np.ndarray, k: int = NEIGHBOURS, device: torch.device | None = None
) -> tuple[float, float]:
    """Of features (n, d) and (m, d) (Kynkaanniemi et al., arXiv 1904.06991): the share of generated images that lie in
    the ball of a reference image, whose radius is the distance to its k-th nearest in its own set; and conversely.

    Block by block: memory grows with n + m only. Each set needs more than k images.
    """
    a, b = (torch.from_numpy(f).to(device or "cpu") for f in (generated, reference))
    radius_a, radius_b = _squared_radii(a, k), _squared_radii(b, k)
    near_b = torch.zeros(len(a), dtype=torch.bool, device=a.device)
    near_a = torch.zeros(len(b), dtype=torch.bool, device=a.device)
    for i in range(0, len(a), ROWS):
        for j in range(0, len(b), COLUMNS):
            rows, columns = slice(i, i + ROWS), slice(j, j + COLUMNS)
            squared = _squared_distances(a[rows], b[columns])
            near_b[rows] |= (squared <= radius_b[None, columns]).any(dim=1)
            near_a[columns] |= (squared <= radius_a[rows, None]).any(dim=0)
    return float(near_b.double().mean()), float(near_a.double().mean())


def _squared_radii(x: Tensor, k: int) -> Tensor:
    """Squared distance (n,) of each vector to its k-th nearest other one; each block serves its rows and columns."""
    nearest = torch.full((len(x), k + 1), torch.inf, dtype=torch.float64, device=x.device)  # itself among them
    for i in range(0, len(x), ROWS):
        for j in range(i, len(x), COLUMNS):
            rows, columns = slice(i, i + ROWS), slice(max(j, i + ROWS), j + COLUMNS)
            squared = _squared_distances(x[rows], x[j : j + COLUMNS])
            nearest[rows] = _smallest(nearest[rows], squared)
            if columns.start < len(x):
                nearest[columns] = _smallest(nearest[columns], squared[:, columns.start - j :].T)
    return nearest[:, k]


def _smallest(known: Tensor, more: Tensor) -> Tensor:
    """The smallest of each row of both, ascending, as many as `known` has."""
    return torch.cat([known, more], dim=1).topk(known.shape[1], dim=1, largest=False).values


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    a, b = a.double(), b.double()
    return torch.addmm(a.square().sum(1)[:, None] + b.square().sum(1), a, b.T, alpha=-2).clamp_(min=0)
