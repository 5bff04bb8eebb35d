"""Prepare the images of claimed parts as batches of arrays, in worker processes, ahead of their use."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from data.errors import DataError
from data.extraction.crop import decode_rgb
from data.extraction.sources import Item, Source
from data.stores.claims import Claims
from data.workers import Loader


@dataclass
class PreparedBatch:
    """Images of one part; `last` marks its last batch, and `rejected` lists the images that could not be read."""

    part: int
    last: bool
    keys: list[str]
    labels: list[int]
    inputs: torch.Tensor  # (b, ...)
    rejected: list[dict]

    def pin_memory(self) -> "PreparedBatch":
        """Return the batch with its inputs in page-locked memory. The loader calls this if there is a GPU."""
        return PreparedBatch(self.part, self.last, self.keys, self.labels, self.inputs.pin_memory(), self.rejected)


def prepared_batches(
    source: Source, claims: Claims, prepare: Callable[[Image.Image], np.ndarray], batch: int, workers: int
) -> Loader:
    """Return a loader of PreparedBatches of the parts that can be claimed, part by part; a part has at least one, even
    if it is empty."""
    return Loader(_Prepared(prepare), workers, sampler=_Batches(source, claims, batch))


class _Batches:
    """Claim parts one after another, ahead of the workers, and cut each into batches."""

    def __init__(self, source: Source, claims: Claims, batch: int) -> None:
        self.source, self.claims, self.batch = source, claims, batch

    def __iter__(self) -> Iterator[tuple[int, bool, list[Item]]]:
        for part in self.claims:
            items = self.source.items(part)
            starts = range(0, max(len(items), 1), self.batch)
            for start in starts:
                yield part, start == starts[-1], items[start : start + self.batch]


class _Prepared(Dataset[PreparedBatch]):
    """Read and prepare the images of a batch, and name those that cannot be read."""

    def __init__(self, prepare: Callable[[Image.Image], np.ndarray]) -> None:
        self.prepare = prepare

    def __getitem__(self, batch: tuple[int, bool, list[Item]]) -> PreparedBatch:
        part, last, items = batch
        good, arrays, rejected = [], [], []
        for item in items:
            try:
                arrays.append(self._prepare(item))
                good.append(item)
            except _Rejected as error:
                rejected.append({"key": item.key, "file": str(item.file), "reason": str(error)})
        inputs = torch.from_numpy(np.stack(arrays)) if arrays else torch.empty(0)
        return PreparedBatch(part, last, [item.key for item in good], [item.label for item in good], inputs, rejected)

    def _prepare(self, item: Item) -> np.ndarray:
        if item.label is None:
            raise _Rejected("no label: its .cls is missing or no number of a class")
        try:
            content = item.read()  # errors other than these are the machine's fault, not the image's
        except (FileNotFoundError, PermissionError) as error:
            if not item.file.parent.is_dir():
                raise DataError(f"{item.file.parent}: is gone since the work began; put it back") from None
            raise _Rejected(error.strerror) from None
        if not content:
            raise _Rejected("no image in it")
        try:
            return self.prepare(decode_rgb(content))
        except Exception as error:  # Pillow raises almost anything for damaged files
            raise _Rejected(f"{type(error).__name__}: {error}") from None


class _Rejected(Exception):
    """An image that cannot be read, and why."""
