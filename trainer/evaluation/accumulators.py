"""Statistics of features that several metrics need: moments, and a sample."""

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from trainer.errors import RunError
from trainer.evaluation.metric import Statistic
from trainer.ranks import Ranks


class Moments:
    """Number, sum and sum of outer products of vectors (d,), in float64: memory does not grow with their number."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.count = 0
        self._sum = torch.zeros(width, dtype=torch.float64, device=device)
        self._outer = torch.zeros(width, width, dtype=torch.float64, device=device)

    def add(self, values: Tensor, numbers: Tensor | None = None) -> None:
        """Add vectors (n, d)."""
        values = values.to(self._sum)
        self.count += len(values)
        self._sum += values.sum(dim=0)
        self._outer.addmm_(values.T, values)

    def reduce(self, ranks: Ranks) -> None:
        """Combine the moments of all ranks, on all of them."""
        count = torch.tensor(self.count, device=self._sum.device)
        for tensor in (count, self._sum, self._outer):
            dist.all_reduce(tensor)
        self.count = int(count)

    def value(self) -> tuple[np.ndarray, np.ndarray]:
        """Return mean (d,) and covariance (d, d), divided by count - 1. Raise RunError if there are not two vectors."""
        if self.count < 2:
            raise RunError(f"{self.count} images: a covariance needs at least 2; give more")
        mean = self._sum / self.count
        covariance = (self._outer - self.count * torch.outer(mean, mean)) / (self.count - 1)
        return mean.cpu().numpy(), covariance.cpu().numpy()


class FeatureSample:
    """Vectors (d,) of all images, or of `most` of them at equal intervals, as float32 in order of their numbers."""

    def __init__(self, width: int, images: int, most: int | None = None) -> None:
        if most is None or images <= most:
            self._kept = np.arange(images)
        else:
            self._kept = np.linspace(0, images - 1, most).astype(int)
        self._features = torch.empty(len(self._kept), width)  # uses memory only where it is filled
        self._first = self._last = 0  # range of the rows filled so far

    def add(self, values: Tensor, numbers: Tensor) -> None:
        """Keep the vectors (n, d) that belong to the sample; `numbers` (n,) ascend by 1 and follow the last ones."""
        start = int(numbers[0])
        low, high = np.searchsorted(self._kept, (start, start + len(numbers)))
        self._features[low:high] = values[torch.from_numpy(self._kept[low:high] - start)].cpu()
        self._first = self._first if self._last else low
        self._last = high

    def reduce(self, ranks: Ranks) -> None:
        """Bring the vectors of all ranks to rank 0."""
        rows: list = [None] * ranks.world_size
        dist.all_gather_object(rows, (self._first, self._last))
        for rank, (first, last) in enumerate(rows):
            if rank and last > first and ranks.rank == 0:
                dist.recv(self._features[first:last], rank)
            elif rank and last > first and ranks.rank == rank:
                dist.send(self._features[first:last], 0)

    def value(self) -> tuple[np.ndarray]:
        """Return the vectors (m, d); after `reduce`, only on rank 0."""
        return (self._features.numpy(),)


MOMENTS = Statistic("moments", "features", lambda width, _, device: Moments(width, device), ("mu", "sigma"))
SPATIAL = Statistic("spatial", "spatial", lambda width, _, device: Moments(width, device), ("mu_s", "sigma_s"))
FEATURES = Statistic("features", "features", lambda width, images, _: FeatureSample(width, images), ("features",))
