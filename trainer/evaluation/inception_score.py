"""The Inception Score (Salimans et al., arXiv 1606.03498, sec. 4, and their code), from class probabilities."""

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from trainer.evaluation.metric import Metric, Statistic
from trainer.ranks import Ranks

SEED = 2020  # of the permutation of the images: torch-fidelity's, so the parts are as well
UNIT = 2.0**-42  # what sums count in: up to 200,000 images a part, of thousands of classes, fit into 63 bits


class InceptionScore:
    """exp of the mean KL(p(y|x) | p(y)), averaged over `splits` random parts of the images of equal size.

    The parts are of a fixed permutation of the images' numbers. Of successive images they would be of a few classes
    each if images come class by class or in groups, and the score far too small. Sums are of integers, so the score is
    the same bit for bit in any order and on any number of ranks. ADM's parts are of 5,000 successive images, which are
    as many for 50,000.
    """

    def __init__(self, classes: int, images: int, device: torch.device, splits: int = 10) -> None:
        order = torch.from_numpy(np.random.RandomState(SEED).permutation(images))  # frozen: equal in all versions
        first = torch.arange(1, splits) * images // splits  # place in `order` where parts 1, 2, ... begin
        self._part = torch.empty(images, dtype=torch.int64)  # of each image
        self._part[order] = torch.bucketize(torch.arange(images), first, right=True)
        self._part = self._part.to(device)
        self._sum = torch.zeros(splits, classes, dtype=torch.int64, device=device)
        self._negentropy = torch.zeros(splits, dtype=torch.int64, device=device)
        self._count = torch.zeros(splits, dtype=torch.int64, device=device)

    def add(self, values: Tensor, numbers: Tensor) -> None:
        """Add class probabilities (n, classes) of the images `numbers` (n,), in any order."""
        p = values.to(self._sum.device).double()
        part = self._part[numbers.to(p.device)]
        self._sum.index_add_(0, part, _counted(p))
        self._negentropy.index_add_(0, part, _counted(torch.xlogy(p, p).sum(dim=1)))
        self._count += torch.bincount(part, minlength=len(self._count))

    def reduce(self, ranks: Ranks) -> None:
        """Combine the sums of all ranks, on all of them."""
        for tensor in (self._sum, self._negentropy, self._count):
            dist.all_reduce(tensor)

    def value(self) -> tuple[np.ndarray]:
        """Return the score; parts without images, if there are fewer images than parts, are left out."""
        some = self._count > 0
        count = self._count[some]
        mean = self._sum[some].double() * UNIT / count[:, None]
        divergence = self._negentropy[some].double() * UNIT / count - torch.xlogy(mean, mean).sum(dim=1)
        return (divergence.exp().mean().cpu().numpy(),)


def _counted(values: Tensor) -> Tensor:
    return (values / UNIT).round().long()


OF_PROBABILITIES = Statistic("inception_score", "probabilities", InceptionScore, ("inception_score",))
IS = Metric(
    "is",
    needs=(OF_PROBABILITIES,),
    kinds=frozenset({"torchscript"}),
    compute=lambda generated, real, device: float(generated[OF_PROBABILITIES.name][0]),
    of_real=(),
)
