"""Turn images into a store of arrays: read, prepare in worker processes, encode in batches, write shards. Any number of
processes may do this at once, each may be killed at any time, and the same call resumes where they stopped."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data.errors import DataError
from data.extraction.prepare import PreparedBatch, prepared_batches
from data.extraction.sources import shared_source
from data.stores.claims import Claims
from data.stores.files import disk_errors
from data.stores.progress import Progress
from data.stores.shards import agree_on_settings, begin, finish, shard_names, write_shard


@dataclass(frozen=True)
class Work:
    """What to make from which images. `settings` hold all that determines the arrays; a folder has only one set of
    them.

    prepare: an RGB image -> an array of fixed shape, in worker processes. encode: a batch (b, ...) of these -> an array
    (b, ...) for each field of the store.
    """

    kind: str
    images: Path
    out: Path
    settings: dict
    prepare: Callable[[Image.Image], np.ndarray]
    encode: Callable[[torch.Tensor], dict[str, np.ndarray]]
    part_size: int
    batch: int
    workers: int
    max_rejects: int


def extract(work: Work, process: int = 0, processes: int = 1) -> dict | None:
    """Make the shards that no other process is making. Return the manifest if all shards then exist, or None if others
    are still at work.

    Raise DataError if the folder has other settings, if more images than allowed cannot be read, or if the disk is
    full.
    """
    with disk_errors(work.out):
        return _extract(work, process, processes)


def _extract(work: Work, process: int, processes: int) -> dict | None:
    source = shared_source(work.images, work.part_size, work.out)  # first: start nothing if it cannot be used
    agree_on_settings(work.out, {"shard_size": work.part_size, **work.settings})
    shards = [work.out / name for name in shard_names(work.kind, source.parts)]
    begin(work.out, shards)
    claims = Claims(work.out, [shard.name for shard in shards], start=process * source.parts // processes)
    batches = prepared_batches(source, claims, work.prepare, work.batch, work.workers)
    with Progress(work.kind, source.images, shards) as progress, ThreadPoolExecutor(1) as writer:
        part, writing = _Part(), deque()
        for batch in batches:
            part.add(batch, work.encode(batch.inputs) if batch.keys else {})
            progress.done(shards[batch.part], len(batch.keys) + len(batch.rejected))
            if batch.last:
                writing.append((batch.part, writer.submit(part.write, shards[batch.part])))
                part = _Part()
            while len(writing) > 1 or (writing and writing[0][1].done()):  # one at a time, to bound the memory
                claims.release(_written(*writing.popleft()))
                progress.shard_written()
        while writing:
            claims.release(_written(*writing.popleft()))
            progress.shard_written()
    return finish(work.out, work.kind, source.parts, source.num_classes, work.max_rejects)


def _written(part: int, writing: Future) -> int:
    writing.result()
    return part


@dataclass
class _Part:
    """The batches of a part that are done so far."""

    keys: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    rejected: list[dict] = field(default_factory=list)
    encoded: list[dict[str, np.ndarray]] = field(default_factory=list)

    def add(self, batch: PreparedBatch, arrays: dict[str, np.ndarray]) -> None:
        for name, array in arrays.items():
            if not np.isfinite(array).all():
                bad = batch.keys[int(np.argmin(np.isfinite(array.reshape(len(array), -1)).all(axis=1)))]
                raise DataError(
                    f"{bad}: {name} is not finite in {array.dtype}; use --dtype float32, or --precision fp32"
                )
        self.keys += batch.keys
        self.labels += batch.labels
        self.rejected += batch.rejected
        if arrays:
            self.encoded.append(arrays)

    def write(self, shard: Path) -> None:
        names = self.encoded[0] if self.encoded else {}
        arrays = {name: np.concatenate([encoded[name] for encoded in self.encoded]) for name in names}
        write_shard(shard, self.keys, self.labels, arrays, self.rejected)
