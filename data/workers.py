"""A loader whose worker processes pass a DataError on as it is.

PyTorch raises what a worker raised anew, with the worker's traceback as its message. Here a DataError takes the place
of an item on its way out of the worker, and is raised where the items arrive.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from data.errors import DataError


class Loader(DataLoader):
    """The items of a dataset as they are, prepared by `workers` processes (0: this one); pinned if there is a GPU."""

    def __init__(self, dataset: Dataset, workers: int, **options: Any) -> None:
        guarded = _Stream(dataset) if isinstance(dataset, IterableDataset) else _Items(dataset)
        pinned = torch.cuda.is_available()
        super().__init__(guarded, batch_size=None, num_workers=workers, pin_memory=pinned, **options)

    def __iter__(self) -> Iterator[Any]:
        """Yield the items. Raise the DataError of a worker."""
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
