"""KID, the kernel distance between two sets of features (Binkowski et al., arXiv 1801.01401), in float64."""

import numpy as np
import torch

from trainer.evaluation.accumulators import FEATURES
from trainer.evaluation.metric import Metric


def kernel_distance(
    a: np.ndarray,
    b: np.ndarray,
    subsets: int = 100,
    size: int = 1000,
    seed: int = 0,
    device: torch.device | None = None,
) -> float:
    """Return KID: the unbiased squared MMD of features (n, d) and (m, d) by the kernel (x·y/d + 1)^3, averaged over
    random subsets of `size` vectors of each set, or of all if there are fewer."""
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


KID = Metric(
    "kid",
    needs=(FEATURES,),
    kinds=frozenset({"torchscript", "dinov2", "classifier"}),
    compute=lambda generated, real, device: kernel_distance(
        *generated[FEATURES.name], *real[FEATURES.name], device=device
    ),
)
