"""The classes of a number of samples: which one each group has, and how many of its images are kept."""

import numpy as np

from data.randomness import group_labels
from models.sampling.generation import SampleConfig
from trainer.errors import RunError


def deal_classes(sample: SampleConfig, number: int, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (class, images kept) of each group, (groups,) int64 each, for `number` samples in all.

    balanced: groups have the classes in turn, and each class's last group is cut where the class has its share: whose
    sizes differ by at most one, the first classes having one more. random: a group's class depends on the seed and its
    number alone; the last group is cut.
    """
    size = sample.group_size
    if sample.labels == "random":
        groups = np.arange(-(-number // size))
        return group_labels(sample.seed, groups, num_classes), np.minimum(number - groups * size, size)
    share = number // num_classes + (np.arange(num_classes) < number % num_classes)
    turns = np.arange(-(-share[0] // size))[:, None]
    kept = (share - turns * size).clip(0, size).ravel()
    (groups,) = kept.nonzero()  # all but some of the last turn
    return groups % num_classes, kept[groups]


def check_per_class(sample: SampleConfig) -> None:
    """Raise RunError if samples `per_class`, of which there are as many of each class, are to have random classes."""
    if sample.labels == "random":
        raise RunError(
            f"sample.labels=random: sample.per_class={sample.per_class} asks for as many of each class; set balanced,"
            " or use tools/sample.py with --num"
        )
