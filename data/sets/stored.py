"""What images in a store have in common, be they latents or pixels: numbers, labels and a neighbour graph."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np

from data.errors import DataError
from data.neighbors.exact import NeighborGraph
from data.neighbors.graph import open_graph
from data.stores.store import Store


class StoredImages:
    """The images of a store by number; see data.sets.registry.Images. What it holds and the field of the config that
    names it have one name, latents or pixels."""

    mirrored = True
    extra: ClassVar[dict[str, tuple[int, ...]]] = {}

    def __init__(self, folder: str, manifest: dict, neighbors: str | None) -> None:
        self._store = Store(Path(folder), manifest)
        self._folder, self._neighbors = folder, neighbors
        self.num_classes: int = manifest["num_classes"]
        self.label = self._store.index["label"].astype(np.int64)

    def __len__(self) -> int:
        return len(self.label)

    def max_neighbors(self) -> int:
        """Those of the graph. DataError if it is missing, or of other images."""
        return self._graph().ids.shape[1]

    def neighbors(self, k: int) -> NeighborGraph:
        """The first k of the graph, memory-mapped."""
        graph = self._graph()
        return NeighborGraph(graph.ids[:, :k], graph.similarities[:, :k])

    def _graph(self) -> NeighborGraph:
        if self._neighbors is None:
            raise DataError(
                "data.neighbors=null: groups.query=similarity needs a graph; make it with tools/build_neighbors.py"
            )
        graph, manifest = open_graph(Path(self._neighbors))
        mine, theirs = self._store.manifest["keys"], manifest["settings"]["keys"]
        if mine != theirs:
            raise DataError(
                f"data.neighbors={self._neighbors}: is of other images ({manifest['images']}, keys {theirs[:12]}) than"
                f" data.{self._store.manifest['kind']}={self._folder} ({len(self)}, keys {mine[:12]}); make both of the"
                " same"
            )
        return graph


def check_expected(kind: str, folder: str, expected: Mapping[str, float | None], found: Mapping[str, float]) -> None:
    """DataError where the config says something of a store, as `channels`, that is not `found` in it; None: nothing."""
    for name, value in expected.items():
        if value is not None and value != found[name]:
            raise DataError(
                f"data.{name}={value}: the {kind} in {folder} have {found[name]}; set data.{name}={found[name]} or"
                f" give other {kind}"
            )
