"""The batches of this rank's steps: by the plan of an epoch, or from a stream of shards."""

import zlib
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from data.batches.loader import BatchDataset, GroupSampler, load_batches
from data.batches.plan import Plan, steps_per_epoch
from data.batches.stream import StreamDataset, stream_batches
from data.batches.windows import Stream
from data.sets.registry import Images
from data.sets.streamed_latents import StreamedLatents
from trainer.build import make_planner, shares_attention
from trainer.config.tree import Config
from trainer.errors import RunError
from trainer.ranks import Ranks


def make_batches(
    config: Config,
    images: Images,
    ranks: Ranks,
    first: int,
    last: int,
    note: Callable[[int, int, Plan], None],
    extra: tuple[str, ...] = (),
) -> DataLoader:
    """Return the micro-batches of each step from `first` to before `last`. All ranks call it. `note` is told of the
    plan of each epoch: its number, the position at which it begins, and the plan. `extra` names what loss terms ask of
    the images."""
    batch, micro_batch = config.train.global_batch, config.train.micro_batch
    slots = config.model.max_group_size
    in_window = shares_attention(config)
    if isinstance(images, StreamedLatents):
        window = config.data.window
        stream = Stream(images.counts, config.groups, batch, config.seed, ranks.rank, ranks.world_size, window)
        dataset = StreamDataset(images, stream, slots, micro_batch, first, last, in_window, extra)
        return stream_batches(dataset, config.data.workers)

    plan_of_epoch = make_planner(config, images)
    epoch_steps = steps_per_epoch(len(images), batch)
    _check_same_plan(plan_of_epoch(first // epoch_steps))

    def planned(epoch: int) -> Plan:
        note(epoch, epoch * epoch_steps * batch, plan_of_epoch(epoch))
        return plan_of_epoch(epoch)

    sampler = GroupSampler(planned, epoch_steps, first, last, ranks.rank, ranks.world_size, micro_batch)
    dataset = BatchDataset(images, config.groups, slots, config.seed, in_window, extra)
    return load_batches(dataset, sampler, config.data.workers)


def _check_same_plan(plan: Plan) -> None:
    """RunError unless all ranks have made the same plan (another library version on one node would do it)."""
    mine = zlib.crc32(plan.images.tobytes() + plan.grouped.tobytes())
    lowest = torch.tensor([mine, -mine])
    dist.all_reduce(lowest, dist.ReduceOp.MIN)
    if lowest[0] != -lowest[1]:
        raise RunError("the ranks have made different plans: give all nodes the same data and package versions")
