"""Latents as training sees them: drawn from the posteriors in a store, which lies in memory-mapped shards."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.errors import DataError
from data.graph import open_graph
from data.neighbors import NeighborGraph
from data.randomness import Draws
from data.store import Store, read_manifest

MADE_BY = "tools/precompute_latents.py"


class LatentFormat:
    """What a store of latents holds. DataError where `expected` (channels, side, scaling; None: any) is not so."""

    def __init__(self, folder: str, expected: dict[str, float | None]) -> None:
        self.manifest = read_manifest(Path(folder), "latents", MADE_BY)
        _, channels, height, width = self.manifest["fields"]["moments"]["shape"]
        self.shape = (channels // 2, height, width)
        self.num_classes: int = self.manifest["num_classes"]
        settings = self.manifest["settings"]
        self.scaling, self.shift = settings["scaling_factor"], settings["shift_factor"]
        self.vae: str = settings["name"]
        self.identity = f"keys {self.manifest['keys'][:12]}, VAE {str(settings.get('vae_weights'))[:12]}"
        found = {"channels": self.shape[0], "side": width, "scaling": self.scaling}
        for name, value in expected.items():
            if value is not None and value != found[name]:
                raise DataError(
                    f"data.{name}={value}: the latents in {folder} have {found[name]}; set data.{name}={found[name]} or"
                    " give other latents"
                )

    def drawn(self, moments: np.ndarray, noise: np.ndarray) -> Tensor:
        """Samples (b, C, h, w) of posteriors of moments (b, 2C, h, w): (mean + std * noise - shift) * scaling."""
        mean, logvar = torch.from_numpy(moments).float().chunk(2, dim=1)
        return (0.5 * logvar).exp_().mul_(torch.from_numpy(noise)).add_(mean).sub_(self.shift).mul_(self.scaling)


class Latents:
    """The images of a store by number; see data.images.Images."""

    posterior = True

    def __init__(
        self, folder: str, neighbors: str | None, vae: str | None, flip: bool, expected: dict[str, float | None]
    ) -> None:
        self._format = LatentFormat(folder, expected)
        self._store = Store(Path(folder), self._format.manifest)
        self._folder, self._neighbors, self._flip = folder, neighbors, flip
        self.shape, self.num_classes = self._format.shape, self._format.num_classes
        self.vae, self.identity = vae or self._format.vae, self._format.identity
        self.label = self._store.index["label"].astype(np.int64)

    def __len__(self) -> int:
        return len(self.label)

    def read(self, numbers: np.ndarray, draws: Draws) -> Tensor:
        """One sample of each image's posterior, or of its mirror image's."""
        entry = draws.flip if self._flip else np.zeros(len(numbers), bool)
        return self._format.drawn(self._store.read("moments", numbers, entry), draws.posterior)

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
        mine, theirs = self._format.manifest["keys"], manifest["settings"]["keys"]
        if mine != theirs:
            raise DataError(
                f"data.neighbors={self._neighbors}: is of other images ({manifest['images']}, keys {theirs[:12]}) than"
                f" data.latents={self._folder} ({len(self)}, keys {mine[:12]}); make both of the same"
            )
        return graph
