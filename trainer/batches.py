"""The batches of this rank's steps, and the check that all ranks have planned the same ones."""

import zlib
from collections.abc import Iterable

import torch
import torch.distributed as dist

from data.batches.batch import Batch
from data.batches.plan import Plan
from data.batches.steps import OnPlan, Steps
from data.sets.images import Images
from trainer.build import shares_attention
from trainer.config.tree import Config
from trainer.errors import RunError
from trainer.ranks import Ranks


def make_batches(
    config: Config,
    images: Images,
    ranks: Ranks,
    first: int,
    last: int,
    on_plan: OnPlan,
    extra: tuple[str, ...] = (),
) -> Iterable[list[Batch]]:
    """Return the micro-batches of each step from `first` to before `last`. All ranks call it and iterate together.

    `on_plan` is called with each epoch's plan when the epoch begins. `extra` names the fields that loss terms request
    of the images.
    """
    checked = False

    def check_first(epoch: int, position: int, plan: Plan) -> None:
        nonlocal checked
        if not checked:
            _check_same_plan(plan)
            checked = True
        on_plan(epoch, position, plan)

    steps = Steps(
        config.groups,
        config.train.global_batch,
        config.model.slots,
        config.seed,
        first,
        last,
        ranks.rank,
        ranks.world_size,
        config.train.micro_batch,
        config.data.workers,
        shares_attention(config),
        extra,
    )
    return images.batches(steps, check_first)


def _check_same_plan(plan: Plan) -> None:
    """Raise RunError unless all ranks have made the same plan. Another library version on a node may change it."""
    mine = zlib.crc32(plan.images.tobytes() + plan.grouped.tobytes())
    lowest = torch.tensor([mine, -mine])
    dist.all_reduce(lowest, dist.ReduceOp.MIN)
    if lowest[0] != -lowest[1]:
        raise RunError("the ranks have made different plans: give all nodes the same data and package versions")
