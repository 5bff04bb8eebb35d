"""The batches that a rank requests from an image set."""

from collections.abc import Callable
from dataclasses import dataclass

from data.batches.batch import InWindow
from data.batches.plan import GroupsConfig, Plan

OnPlan = Callable[[int, int, Plan], None]  # (epoch, position at which it begins, its plan)


@dataclass(frozen=True)
class Steps:
    """The steps of a run from `first` up to but not including `last`, and this rank's part of them.

    `in_window` and `extra` are arguments of make_batch; `workers` processes prepare the batches (0: the calling one).
    """

    groups: GroupsConfig
    global_batch: int
    max_group_size: int
    seed: int
    first: int
    last: int
    rank: int = 0
    world_size: int = 1
    micro_batch: int | None = None  # most images in a micro-batch; None: no limit
    workers: int = 0
    in_window: InWindow | None = None
    extra: tuple[str, ...] = ()
