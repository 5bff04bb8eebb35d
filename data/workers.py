"""A loader whose worker processes pass on a DataError unchanged.

PyTorch re-raises a worker's exception with the worker's traceback as its message. Here, the worker returns a DataError
in place of an item, and the loader raises it in the main process.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from data.errors import DataError


class Loader(DataLoader):
    """The unbatched items of a dataset, prepared by `workers` processes (0: this one); pinned if there is a GPU."""

    def __init__(self, dataset: Dataset, workers: int, **options: Any) -> None:
        guarded = _Stream(dataset) if isinstance(dataset, IterableDataset) else _Items(dataset)
        pinned = torch.cuda.is_available()
        super().__init__(guarded, batch_size=None, num_workers=workers, pin_memory=pinned, **options)

    def __iter__(self) -> Iterator[Any]:
        """Yield the items. Raise DataError if a worker did."""
        for item in super().__iter__():
            if isinstance(item, DataError):
                raise item
            yield item


class _Items(Dataset):
    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, key: object) -> object:
        try:
            return self.dataset[key]
        except DataError as error:
            return error


class _Stream(IterableDataset):
    def __init__(self, dataset: IterableDataset) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[object]:
        try:
            yield from self.dataset
        except DataError as error:
            yield error
