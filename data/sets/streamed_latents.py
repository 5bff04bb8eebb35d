"""Latents that are read shard by shard instead of image by image (see data/batches/stream.py)."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor
from webdataset.compat import WebDataset

from data.batches.batch import Batch
from data.batches.steps import OnPlan, Steps
from data.batches.stream import stream_batches
from data.errors import DataError
from data.neighbors.exact import NeighborGraph, nearest_neighbors
from data.randomness import Draws
from data.sets.extra import extra_fields, read_field
from data.sets.latents import MAIN, LatentFormat
from data.stores.store import damaged, gone


class StreamedLatents:
    """An image set that reads only the manifest of a store of latents, and then its shards in windows of `window`."""

    def __init__(self, folder: str, vae: str | None, flip: bool, expected: dict, window: int = 8) -> None:
        self.format = LatentFormat(folder, expected)
        self.folder, self.flip, self.window = Path(folder), flip, window
        self.shape, self.num_classes = self.format.shape, self.format.num_classes
        self.vae, self.identity = vae or self.format.vae, self.format.identity
        self.counts: list[int] = [shard["images"] for shard in self.format.manifest["shards"]]
        self.has_features = "feature" in self.format.manifest["fields"]
        self.fields = extra_fields(folder, self.format.manifest, MAIN)

    def __len__(self) -> int:
        return sum(self.counts)

    @property
    def extra(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the extra fields of the store."""
        return {name: field.shape for name, field in self.fields.items()}

    def max_neighbors(self) -> int:
        """Return the number of other images; only those in the window are searched. Raise DataError if the store has no
        features."""
        if not self.has_features:
            raise DataError(
                f"data.streaming=true: {self.folder} holds no features, which groups.query=similarity needs; make it"
                " with tools/cluster_latents.py"
            )
        return len(self) - 1

    def pool(self) -> "LatentPool":
        """Return all images in the first window of shards."""
        return self.read_shards(tuple(range(min(self.window, len(self.counts)))))

    def batches(self, steps: Steps, on_plan: OnPlan) -> Iterable[list[Batch]]:
        """Return the batches of a stream of shards, which has no plans."""
        return stream_batches(self, self.window, steps)

    def resume_note(self, before: int, now: int) -> str | None:
        """Return how another world size affects the stream; None if it is the same."""
        if before == now:
            return None
        return (
            f"{now} ranks instead of {before}: data.streaming deals the shards anew, so images of this epoch may come"
            " twice or not at all"
        )

    def read_shards(self, shards: tuple[int, ...], extra: tuple[str, ...] = ()) -> "LatentPool":
        """Return all images of some shards, with the fields `extra`, read sequentially by webdataset."""
        needed = [MAIN, *(["feature"] if self.has_features else []), *extra]
        samples = [sample for shard in shards for sample in self._samples(shard, needed)]
        arrays = {name: np.stack([sample[f"{name}.npy"] for sample in samples]) for name in needed}
        label = np.array([sample["cls"] for sample in samples], np.int64)
        return LatentPool(self, arrays[MAIN], label, arrays.get("feature"), {name: arrays[name] for name in extra})

    def _samples(self, shard: int, fields: list[str]) -> list[dict]:
        path = self.folder / self.format.manifest["shards"][shard]["name"]
        needed = {f"{name}.npy" for name in fields} | {"cls"}
        shards = WebDataset([str(path)], shardshuffle=False, nodesplitter=None, workersplitter=None)
        whole = cast(Iterable[dict], shards.decode())
        try:
            samples = [sample for sample in whole if needed <= sample.keys()]
        except FileNotFoundError as error:
            raise gone(path) from error
        except (OSError, MemoryError):  # the machine's fault, not the file's
            raise
        except Exception as error:  # readers raise almost anything for damaged files
            raise damaged(path, f"cannot be read ({type(error).__name__})") from error
        if len(samples) != self.counts[shard]:
            raise damaged(path, f"holds {len(samples)} images, should be {self.counts[shard]}")
        return samples


@dataclass(frozen=True)
class LatentPool:
    """Images in memory: moments (n, 2, 2C, h, w) of each image and its mirror image, label (n,), features (n, d), and
    `further`, the extra fields (n, ...) of the store."""

    source: StreamedLatents
    moments: np.ndarray
    label: np.ndarray
    features: np.ndarray | None
    further: dict[str, np.ndarray]
    posterior = mirrored = True

    @property
    def shape(self) -> tuple[int, int, int]:
        """C, H, W of a latent."""
        return self.source.shape

    @property
    def extra(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the extra fields."""
        return {name: self.source.fields[name].shape for name in self.further}

    def read(self, numbers: np.ndarray, draws: Draws) -> Tensor:
        """Return one sample of each image's posterior, or of its mirror image's."""
        return self.source.format.drawn(self.moments[numbers, self._entry(draws)], draws)

    def read_extra(self, numbers: np.ndarray, draws: Draws, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
        """Return extra fields as they are stored."""

        def read(name: str, entry: np.ndarray | None) -> np.ndarray:
            array = self.further[name]
            return array[numbers] if entry is None else array[numbers, entry.astype(np.intp)]

        flip = np.broadcast_to(self._entry(draws), len(numbers)).astype(bool)
        fields = self.source.fields
        return {name: read_field(fields[name], lambda entry, name=name: read(name, entry), flip) for name in names}

    def neighbors(self, k: int) -> NeighborGraph:
        """Return the k nearest to each among these images, or all others if there are fewer."""
        if self.features is None:
            raise DataError(f"{self.source.folder}: holds no features; make it with tools/cluster_latents.py")
        return nearest_neighbors(self.features, min(k, len(self.label) - 1))

    def keep(self, numbers: np.ndarray, new: "LatentPool") -> "LatentPool":
        """Return these images followed by those of `new`, without features."""

        def joined(mine: np.ndarray, others: np.ndarray) -> np.ndarray:
            return np.concatenate([mine[numbers], others])

        further = {name: joined(array, new.further[name]) for name, array in self.further.items()}
        return LatentPool(self.source, joined(self.moments, new.moments), joined(self.label, new.label), None, further)

    def _entry(self, draws: Draws) -> np.ndarray | int:
        """Return the index on the second axis of the moments to read for each image."""
        return draws.flip.astype(np.intp) if self.source.flip and draws.flip is not None else 0
