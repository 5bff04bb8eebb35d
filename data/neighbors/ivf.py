"""Approximate neighbours by FAISS's inverted lists, for sites with only CPUs: fast, but misses some neighbours."""

import numpy as np

from data.errors import DataError
from data.neighbors.exact import ExactSearch

MORE = 16  # candidates beyond those requested: FAISS ranks in float32


class IVFSearch:
    """The images of `features` (n, d) in 4 sqrt(n) inverted lists (k-means); a search examines `probes` of them."""

    def __init__(self, features: np.ndarray, probes: int, exact: ExactSearch) -> None:
        try:
            import faiss
        except ImportError:
            raise DataError("--method ivf: needs faiss; pip install faiss-cpu, or use --method exact") from None
        norms = np.linalg.norm(features.astype(np.float64), axis=1, keepdims=True)
        self._rows = (features / np.where(norms, norms, 1)).astype(np.float32)
        lists = max(1, min(int(4 * len(features) ** 0.5), len(features) // 40))
        self._index = faiss.index_factory(features.shape[1], f"IVF{lists},Flat", faiss.METRIC_INNER_PRODUCT)
        self._index.train(self._rows)
        self._index.add(self._rows)
        faiss.ParameterSpace().set_index_parameter(self._index, "nprobe", min(probes, lists))
        self._exact = exact

    def nearest(self, images: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (ids (b, k) int32, similarities (b, k) float64) of the nearest images found, ranked as ExactSearch
        does. Images whose lists hold fewer than k others are compared to all."""
        _, found = self._index.search(self._rows[images], k + 1 + MORE)
        found[found == images[:, None]] = -1
        found.sort(axis=1)
        ids, similarities = self._exact.rank(images, found, k)
        few = (found >= 0).sum(axis=1) < k
        if few.any():
            ids[few], similarities[few] = self._exact.nearest(images[few], k)
        return ids, similarities
