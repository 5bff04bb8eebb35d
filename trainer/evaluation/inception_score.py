"""The Inception Score (Salimans et al., arXiv 1606.03498, sec. 4, and their code), from class probabilities."""

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from trainer.evaluation.metric import Metric, Statistic
from trainer.ranks import Ranks


class InceptionScore:
    """exp of the mean KL(p(y|x) | p(y)), averaged over `splits` successive parts of the images, in float64. ADM's parts
    have 5,000 images: the same for 50,000.
    """

    def __init__(self, classes: int, images: int, device: torch.device, splits: int = 10) -> None:
        self._first = torch.arange(1, splits, device=device) * images // splits  # first image of parts 1, 2, ...
        self._sum = torch.zeros(splits, classes, dtype=torch.float64, device=device)
        self._negentropy = torch.zeros(splits, dtype=torch.float64, device=device)
        self._count = torch.zeros(splits, dtype=torch.float64, device=device)

    def add(self, values: Tensor, numbers: Tensor) -> None:
        """Add class probabilities (n, classes) of the images `numbers` (n,), in any order."""
        p = values.to(self._sum)
        part = torch.bucketize(numbers.to(p.device), self._first, right=True)
        self._sum.index_add_(0, part, p)
        self._negentropy.index_add_(0, part, torch.xlogy(p, p).sum(dim=1))
        self._count += torch.bincount(part, minlength=len(self._count))

    def reduce(self, ranks: Ranks) -> None:
        """Combine the sums of all ranks, on all of them."""
        for tensor in (self._sum, self._negentropy, self._count):
            dist.all_reduce(tensor)

    def value(self) -> tuple[np.ndarray]:
        """Return the score; parts without images, if there are fewer images than parts, are left out."""
        some = self._count > 0
        count, mean = self._count[some], self._sum[some] / self._count[some, None]
        divergence = self._negentropy[some] / count - torch.xlogy(mean, mean).sum(dim=1)
        return (divergence.exp().mean().cpu().numpy(),)


OF_PROBABILITIES = Statistic("inception_score", "probabilities", InceptionScore, ("inception_score",))
IS = Metric(
    "is",
    needs=(OF_PROBABILITIES,),
    kinds=frozenset({"torchscript"}),
    compute=lambda generated, real, device: float(generated[OF_PROBABILITIES.name][0]),
    compares=False,
)
