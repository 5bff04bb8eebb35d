"""Random access to a store that data/stores/shards.py wrote, through memory maps: the tar shards are the storage
format."""

import json
from hashlib import sha256 as new_hash
from pathlib import Path

import numpy as np
import torch

from data.errors import DataError
from data.stores.shards import INDEX, MANIFEST


def read_manifest(folder: Path, kind: str, made_by: str) -> dict:
    """Return the manifest of a complete store of `kind`. Raise DataError if there is none."""
    path = folder / MANIFEST
    if not path.is_file():
        raise DataError(f"{folder}: no {MANIFEST} in it, so not (yet) complete; make it with {made_by}")
    manifest = json.loads(path.read_text())
    if manifest["kind"] != kind:
        raise DataError(f"{folder}: holds {manifest['kind']}, not {kind}; give a folder made by {made_by}")
    return manifest


def contents_digest(manifest: dict) -> str:
    """Return a checksum of the contents of all shards of a store."""
    return new_hash(json.dumps(manifest["shards"]).encode()).hexdigest()


def damaged(shard: Path, wrong: str) -> DataError:
    """Return the error for a shard that is not as it was written."""
    return DataError(f"{shard}: {wrong}; remove it, and start what made {shard.parent} again")


def gone(shard: Path) -> DataError:
    """Return the error for a missing shard."""
    return DataError(f"{shard}: is gone; put it back, or start what made {shard.parent} again")


class Store:
    """Arrays of images by number. Nothing is in memory except what the system caches of the files."""

    def __init__(self, folder: Path, manifest: dict) -> None:
        self.folder, self.manifest = folder, manifest
        self.index = np.load(folder / INDEX, mmap_mode="r")
        self._maps: dict[tuple[str, int], np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.index)

    def read(self, field: str, numbers: np.ndarray, entry: np.ndarray | None = None) -> np.ndarray:
        """Return the arrays of images `numbers` (b,), stacked; given `entry` (b,), only that entry of the first axis of
        each."""
        shape, dtype = (self.manifest["fields"][field][name] for name in ("shape", "dtype"))
        out = np.empty((len(numbers), *(shape if entry is None else shape[1:])), dtype)
        rows = out.reshape(len(numbers), -1)
        size = rows.shape[1]
        where = self.index[numbers]
        start = where[field] // out.itemsize
        if entry is not None:
            start += entry.astype(np.int64) * size
        for row, shard, begin in zip(rows, where["shard"].tolist(), start.tolist(), strict=True):
            found = self._map(field, out.dtype, shard)[begin : begin + size]
            if len(found) < size:
                raise damaged(self._path(shard), f"ends before number {begin + size} of its {field}")
            row[:] = found
        return out

    def _path(self, shard: int) -> Path:
        return self.folder / self.manifest["shards"][shard]["name"]

    def _map(self, field: str, dtype: np.dtype, shard: int) -> np.ndarray:
        found = self._maps.get((field, shard))
        if found is None:
            path = self._path(shard)
            if not path.is_file():
                raise gone(path)
            size = path.stat().st_size // dtype.itemsize
            # each of numpy's memory maps keeps a file open, and there may be more shards than the limit on open files
            mapped = torch.from_file(str(path), shared=False, size=size, dtype=getattr(torch, dtype.name))
            found = self._maps[field, shard] = mapped.numpy()
        return found
