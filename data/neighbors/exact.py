"""The exact neighbour graph: for each image, the k most similar other images by cosine.

Fast products find candidates, float64 ranks them, and an error bound proves that none was missed; where it cannot, the
search is repeated in the next finer precision. Features that are whole numbers, or float16 vectors of length about 1,
have exact dot products in float64, whatever the order of summation: every machine then finds the same graph, ties
included.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

COLUMNS = 2**17  # images that a block of rows is compared to at once
EXACT_ELEMENTS = 2**21  # float64 numbers at once when candidates are ranked


@dataclass(frozen=True)
class NeighborGraph:
    """ids (n, k) int32, nearest first, without the image itself and without repeats; similarities (n, k) float32, or
    float16 rounded down."""

    ids: np.ndarray
    similarities: np.ndarray


def nearest_neighbors(features: np.ndarray, k: int, block: int = 1024) -> NeighborGraph:
    """Return the k nearest by cosine of `features` (n, d), ties ordered by id. An image of zeros has similarity 0 to
    all."""
    if not 1 <= k < len(features):
        raise ValueError(f"groups.neighbors={k}: must be from 1 to the number of images less one, {len(features) - 1}")
    search = ExactSearch(features)
    blocks = [search.nearest(np.arange(i, min(i + block, len(features))), k) for i in range(0, len(features), block)]
    ids, similarities = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
    return NeighborGraph(ids, similarities.astype(np.float32))


class ExactSearch:
    """The images of `features` (n, d), ready to be compared. `precision` is that of the first search."""

    def __init__(
        self, features: np.ndarray, device: torch.device | str = "cpu", precision: Literal["bf16", "fp32"] = "fp32"
    ) -> None:
        self._rows = torch.from_numpy(np.ascontiguousarray(features)).to(device)
        squares = torch.cat([rows.double().square().sum(dim=1) for rows in self._rows.split(2**14)])
        self._norms = torch.from_numpy(np.sqrt(squares.cpu().numpy())).to(device)  # torch may round otherwise
        self._norms[self._norms == 0] = 1
        unit = self._rows.float() / self._norms.float()[:, None]
        self._looks = [_Look(unit, extra=16, error=_fp32_error(unit.shape[1]))]
        if precision == "bf16":
            rounded = unit.bfloat16()
            moved = max(
                float((a - b.float()).norm(dim=1).max())
                for a, b in zip(unit.split(2**14), rounded.split(2**14), strict=True)
            )
            # rounding of both factors (Cauchy-Schwarz), and of the product to 8 bits
            error = 2 * moved + moved**2 + 1.02 * 2**-8 + _fp32_error(unit.shape[1])
            self._looks.insert(0, _Look(rounded, extra=192, error=error))

    def nearest(self, images: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (ids (b, k) int32, similarities (b, k) float64) of the k nearest to each image (b,)."""
        ids = np.empty((len(images), k), np.int32)
        similarities = np.empty((len(images), k))
        left = np.arange(len(images))
        for look in self._looks:
            if len(left):
                found, cosine, proven = self._look(images[left], k, look)
                ids[left[proven]], similarities[left[proven]] = found[proven], cosine[proven]
                left = left[~proven]
        for i in range(0, len(left), rows := max(1, 2**26 // len(self._rows))):
            some = left[i : i + rows]
            ids[some], similarities[some] = self._sort_all(images[some], k)
        return ids, similarities

    def rank(self, images: np.ndarray, candidates: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the same among `candidates` (b, m) only: ids in ascending order, -1 for none."""
        device = self._rows.device
        cosine, ids = self._ranked(torch.from_numpy(images).to(device), torch.from_numpy(candidates).to(device), k)
        return ids.int().cpu().numpy(), cosine.cpu().numpy()

    def _look(self, images: np.ndarray, k: int, look: "_Look") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (ids, similarities, whether they are proven correct (b,)), found by products of rounded rows."""
        mine = torch.from_numpy(images).to(look.unit.device)
        number = min(k + look.extra, len(look.unit) - 1)
        best, ids = look.unit.new_empty(len(mine), 0), mine.new_empty(len(mine), 0)
        for start in range(0, len(look.unit), COLUMNS):
            with _full_precision():
                products = look.unit[mine] @ look.unit[start : start + COLUMNS].T
            inside = ((mine >= start) & (mine < start + COLUMNS)).nonzero().squeeze(1)
            products[inside, mine[inside] - start] = -torch.inf
            values, columns = products.topk(min(number, products.shape[1]), dim=1)
            best, kept = torch.cat([best, values], dim=1).topk(min(number, best.shape[1] + values.shape[1]), dim=1)
            ids = torch.cat([ids, columns + start], dim=1).gather(1, kept)
        cosine, ids = self._ranked(mine, ids.sort(dim=1).values, k)
        others = best[:, -1].double() + look.error  # no image that is not a candidate is nearer than this
        proven = (cosine[:, -1] > others) | (number == len(look.unit) - 1)
        return ids.cpu().numpy(), cosine.cpu().numpy(), proven.cpu().numpy()

    def _ranked(self, images: Tensor, candidates: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return (similarities (b, k) float64, ids (b, k)) of the nearest of `candidates` (b, m), which are in order of
        id; -1: none."""
        (m, d), device = (candidates.shape[1], self._rows.shape[1]), self._rows.device
        rows = max(1, EXACT_ELEMENTS // (m * d))
        stored = torch.empty(rows * m, d, dtype=self._rows.dtype, device=device)  # reused: fresh memory is slow
        doubles = torch.empty(rows, m, d, dtype=torch.float64, device=device)
        cosine = torch.empty(candidates.shape, dtype=torch.float64, device=device)
        wanted = candidates.clamp(min=0)
        for start in range(0, len(images), rows):
            some = slice(start, start + rows)
            number = len(images[some])
            torch.index_select(self._rows, 0, wanted[some].flatten(), out=stored[: number * m])
            doubles[:number].copy_(stored[: number * m].view(number, m, d))
            mine = self._rows[images[some]].double()
            torch.bmm(doubles[:number], mine[:, :, None], out=cosine[some, :, None])
        cosine /= self._norms[images, None] * self._norms[candidates]
        cosine[candidates < 0] = -torch.inf
        cosine, order = cosine.sort(dim=1, descending=True, stable=True)
        return cosine[:, :k], candidates.gather(1, order[:, :k])

    def _sort_all(self, images: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (ids, similarities), found by comparing to all other images in float64."""
        mine = torch.from_numpy(images).to(self._rows.device)
        products = [self._rows[mine].double() @ rows.double().T for rows in self._rows.split(2**14)]
        cosine = torch.cat(products, dim=1) / (self._norms[mine, None] * self._norms)
        cosine[torch.arange(len(mine)), mine] = -torch.inf
        cosine, order = cosine.sort(dim=1, descending=True, stable=True)
        return order[:, :k].cpu().numpy(), cosine[:, :k].cpu().numpy()


@contextmanager
def _full_precision() -> Iterator[None]:
    """Compute products on GPUs as the error bounds assume, whatever the program has set."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32, matmul.allow_bf16_reduced_precision_reduction
    matmul.allow_tf32 = matmul.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        matmul.allow_tf32, matmul.allow_bf16_reduced_precision_reduction = before


@dataclass(frozen=True)
class _Look:
    """Rows of length 1, rounded to a fast type; number of candidates beyond k; largest error of a product."""

    unit: Tensor
    extra: int
    error: float


def _fp32_error(length: int) -> float:
    """Return the largest error of a dot product of two unit vectors in any order of summation, including the rounding
    of the vectors (Higham, "Accuracy and Stability of Numerical Algorithms", section 3.1)."""
    return (length + 8) * 2**-24
