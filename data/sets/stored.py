"""What images in a store have in common, whether latents or pixels: numbers, labels, extra fields and a graph."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from data.errors import DataError
from data.neighbors.exact import NeighborGraph
from data.neighbors.graph import open_graph
from data.randomness import Draws
from data.sets.extra import extra_fields, read_field
from data.sets.images import ByNumber
from data.stores.store import Store


class StoredImages(ByNumber):
    """The images of a store by number; the field `main` holds them. The kind of the store and the config field for its
    folder have the same name, latents or pixels."""

    mirrored = True

    def __init__(self, folder: str, manifest: dict, main: str, neighbors: str | None, flip: bool) -> None:
        self._store = Store(Path(folder), manifest)
        self._folder, self._neighbors, self._flip = folder, neighbors, flip
        self._fields = extra_fields(folder, manifest, main)
        self.num_classes: int = manifest["num_classes"]
        self.label = self._store.index["label"].astype(np.int64)

    @property
    def extra(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the extra fields of the store."""
        return {name: field.shape for name, field in self._fields.items()}

    def read_extra(self, numbers: np.ndarray, draws: Draws, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
        """Return extra fields as they are stored."""
        flip = self.flipped(numbers, draws)
        return {
            name: read_field(self._fields[name], lambda entry, name=name: self._store.read(name, numbers, entry), flip)
            for name in names
        }

    def flipped(self, numbers: np.ndarray, draws: Draws) -> np.ndarray:
        """Return which images are read as mirror images, (b,) bool."""
        return draws.flip if self._flip and draws.flip is not None else np.zeros(len(numbers), bool)

    def max_neighbors(self) -> int:
        """Return the number of neighbors in the graph. Raise DataError if it is missing, or of other images."""
        return self._graph().ids.shape[1]

    def neighbors(self, k: int) -> NeighborGraph:
        """Return the first k neighbors in the graph, memory-mapped."""
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
    """Raise DataError if a value that the config expects (None: any), say `channels`, differs from the one `found` in a
    store."""
    for name, value in expected.items():
        if value is not None and value != found[name]:
            raise DataError(
                f"data.{name}={value}: the {kind} in {folder} have {found[name]}; set data.{name}={found[name]} or"
                f" give other {kind}"
            )
