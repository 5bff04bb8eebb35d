"""Neighbour graph: for each image the k most similar others, by cosine, exactly."""

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class NeighborGraph:
    """ids (n, k) int32, nearest first, never the image itself nor one twice; similarities (n, k) float32."""

    ids: np.ndarray
    similarities: np.ndarray


def nearest_neighbors(features: np.ndarray, k: int, block: int = 1024) -> NeighborGraph:
    """The k nearest by cosine of `features` (n, d), computed in float64 by blocks of rows; equal ones: lower id first.

    The dot products come before the normalisation: those of whole numbers are then exact, whatever the order in which a
    machine sums them, so all ranks find the same graph. An image of zeros has similarity 0 to all.
    """
    if not 1 <= k < len(features):
        raise ValueError(f"groups.neighbors={k}: must be from 1 to the number of images less one, {len(features) - 1}")
    rows = torch.from_numpy(np.ascontiguousarray(features, dtype=np.float64))
    norms = rows.square().sum(dim=1).sqrt()
    norms[norms == 0] = 1
    ids = np.empty((len(rows), k), np.int32)
    similarities = np.empty((len(rows), k), np.float32)
    for start in range(0, len(rows), block):
        stop = min(start + block, len(rows))
        cosine = rows[start:stop] @ rows.T / (norms[start:stop, None] * norms)
        cosine[torch.arange(stop - start), torch.arange(start, stop)] = -torch.inf
        values, order = cosine.sort(dim=1, descending=True, stable=True)
        ids[start:stop] = order[:, :k]
        similarities[start:stop] = values[:, :k]
    return NeighborGraph(ids, similarities)
