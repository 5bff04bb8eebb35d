"""Latents that are read shard by shard instead of image by image (see data/batches/stream.py)."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import webdataset
from torch import Tensor

from data.errors import DataError
from data.randomness import Draws
from data.sets.latents import LatentFormat
from data.stores.store import damaged, gone


class StreamedLatents:
    """A store of latents of which only the manifest is read; see data.sets.registry.Images. Its shards are read in
    windows."""

    posterior = mirrored = True
    extra: ClassVar[dict[str, tuple[int, ...]]] = {}

    def __init__(self, folder: str, vae: str | None, flip: bool, expected: dict) -> None:
        self.format = LatentFormat(folder, expected)
        self.folder, self.flip = Path(folder), flip
        self.shape, self.num_classes = self.format.shape, self.format.num_classes
        self.vae, self.identity = vae or self.format.vae, self.format.identity
        self.counts = [shard["images"] for shard in self.format.manifest["shards"]]
        self.has_features = "feature" in self.format.manifest["fields"]

    def __len__(self) -> int:
        return sum(self.counts)

    def max_neighbors(self) -> int:
        """All others; those in the window are found. DataError without features."""
        if not self.has_features:
            raise DataError(
                f"data.streaming=true: {self.folder} holds no features, which groups.query=similarity needs; make it"
                " with tools/cluster_latents.py"
            )
        return len(self) - 1

    def first(self, window: int) -> "Pool":
        """All images of the first `window` shards."""
        return self.read_shards(tuple(range(min(window, len(self.counts)))))

    def read_shards(self, shards: tuple[int, ...]) -> "Pool":
        """All images of some shards, read from start to end by the webdataset library."""
        samples = [sample for shard in shards for sample in self._samples(shard)]
        features = np.stack([sample["feature.npy"] for sample in samples]) if self.has_features else None
        label = np.array([sample["cls"] for sample in samples], np.int64)
        return Pool(self, np.stack([sample["moments.npy"] for sample in samples]), label, features)

    def _samples(self, shard: int) -> list[dict]:
        path = self.folder / self.format.manifest["shards"][shard]["name"]
        needed = {"moments.npy", "cls"} | ({"feature.npy"} if self.has_features else set())
        whole = webdataset.WebDataset([str(path)], shardshuffle=False, nodesplitter=None, workersplitter=None).decode()
        try:
            samples = [sample for sample in whole if needed <= sample.keys()]
        except FileNotFoundError as error:
            raise gone(path) from error
        except (OSError, MemoryError):  # the machine's fault, not the file's
            raise
        except Exception as error:  # readers raise nearly anything at damaged files
            raise damaged(path, f"cannot be read ({type(error).__name__})") from error
        if len(samples) != self.counts[shard]:
            raise damaged(path, f"holds {len(samples)} images, should be {self.counts[shard]}")
        return samples


@dataclass(frozen=True)
class Pool:
    """Images in memory: moments (n, 2, 2C, h, w) of each and of its mirror image, label (n,), features (n, d)."""

    source: StreamedLatents
    moments: np.ndarray
    label: np.ndarray
    features: np.ndarray | None
    posterior = mirrored = True
    extra: ClassVar[dict[str, tuple[int, ...]]] = {}

    @property
    def shape(self) -> tuple[int, int, int]:
        """C, H, W of a latent."""
        return self.source.shape

    def read(self, numbers: np.ndarray, draws: Draws) -> Tensor:
        """One sample of each image's posterior, or of its mirror image's."""
        entry = draws.flip.astype(np.intp) if self.source.flip else 0
        return self.source.format.drawn(self.moments[numbers, entry], draws.posterior)

    def keep(self, numbers: np.ndarray, new: "Pool") -> "Pool":
        """These images, and behind them those of `new`."""
        moments = np.concatenate([self.moments[numbers], new.moments])
        return Pool(self.source, moments, np.concatenate([self.label[numbers], new.label]), None)
