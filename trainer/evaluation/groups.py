"""Which generated images are of one group."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from trainer.evaluation.image_sets import StoredImages

RECORD = "samples.json"
GROUPS = "groups"  # where a side of a comparison has them, beside its statistics


class Groups(NamedTuple):
    """Numbers of each image's group and class, (n,) each. The images of a group follow one another."""

    group: np.ndarray
    label: np.ndarray


def make_groups(label: np.ndarray, size: int) -> Groups | None:
    """Return the groups of images with the labels (n,), generated in groups of `size`; None unless a class has two
    groups of two or more.

    A group is of one class, so each run of equal labels begins one, and has a further one after every `size` images;
    the last of a class may have been cut.
    """
    numbers = np.arange(len(label))
    begins = np.diff(label, prepend=label[:1] - 1) != 0
    place = numbers - np.maximum.accumulate(np.where(begins, numbers, 0))  # in its run
    group = np.cumsum(place % size == 0) - 1
    sizes = np.bincount(group)
    large = label[np.cumsum(sizes) - 1][sizes > 1]  # classes of the groups of two or more
    return Groups(group, label) if len(large) > len(np.unique(large)) else None


def read_groups(path: Path, images: StoredImages) -> Groups | None:
    """Return the groups of the samples at `path`, an .npz file or a folder of pictures, by samples.json beside or in
    it; None if they are none, or there is none."""
    record, label = record_of(path), images.labels()
    return make_groups(label, group_size(json.loads(record.read_text()))) if record and label is not None else None


def record_of(path: Path) -> Path | None:
    """Return the samples.json of the samples at `path`, if there is one."""
    record = path / RECORD if path.is_dir() else path.with_name(RECORD)
    return record if record.is_file() and (path.is_dir() or path.stem == record.stem) else None


def group_size(record: dict) -> int:
    """Return the group size of samples by their record."""
    return max(record.get(name) or 1 for name in ("cond_group_size", "uncond_group_size"))
