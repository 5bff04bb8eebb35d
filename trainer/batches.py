"""The batches of this rank's steps: by the plan of an epoch, or from a stream of shards."""

import zlib
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader

from data.batches.loader import BatchDataset, GroupSampler, load_batches
from data.batches.plan import Plan, steps_per_epoch
from data.batches.stream import StreamDataset, stream_batches
from data.batches.windows import Stream
from data.sets.registry import Images
from data.sets.streamed_latents import StreamedLatents
from models.paths.base import Path
from models.paths.registry import make_path
from models.sampling.guidance import Interval, inside
from trainer.build import make_planner
from trainer.config.tree import Config
from trainer.errors import RunError
from trainer.monitor import Monitor
from trainer.ranks import Ranks


def make_batches(config: Config, images: Images, ranks: Ranks, first: int, last: int, monitor: Monitor) -> DataLoader:
    """The micro-batches of each of the steps from `first` to before `last`. All ranks call it."""
    batch, micro_batch = config.train.global_batch, config.train.micro_batch
    slots = config.model.max_group_size
    in_window = shares_attention(config)
    if isinstance(images, StreamedLatents):
        window = config.data.window
        stream = Stream(images.counts, config.groups, batch, config.seed, ranks.rank, ranks.world_size, window)
        dataset = StreamDataset(images, stream, slots, micro_batch, first, last, in_window)
        return stream_batches(dataset, config.data.workers)

    plan_of_epoch = make_planner(config, images)
    epoch_steps = steps_per_epoch(len(images), batch)
    _check_same_plan(plan_of_epoch(first // epoch_steps))

    def planned(epoch: int) -> Plan:
        monitor.plan(epoch, epoch * epoch_steps * batch, plan_of_epoch(epoch))
        return plan_of_epoch(epoch)

    sampler = GroupSampler(planned, epoch_steps, first, last, ranks.rank, ranks.world_size, micro_batch)
    dataset = BatchDataset(images, config.groups, slots, config.seed, in_window)
    return load_batches(dataset, sampler, config.data.workers)


def shares_attention(config: Config) -> Callable[[Tensor], Tensor] | None:
    """Whether groups share attention at times that a batch has as shares of the path's distribution; None: at all."""
    return partial(_in_window, make_path(config.path), config.groups.window) if config.groups.window else None


def _in_window(path: Path, window: Interval, share: Tensor) -> Tensor:
    """Whether log-SNRs are in the window, of times that a batch has as shares of the path's distribution."""
    log_snr = path.log_snr(path.timestep(share)).tolist()
    return torch.tensor([inside(value, window) for value in log_snr], dtype=torch.bool)


def _check_same_plan(plan: Plan) -> None:
    """RunError unless all ranks have made the same plan (another library version on one node would do it)."""
    mine = zlib.crc32(plan.images.tobytes() + plan.grouped.tobytes())
    lowest = torch.tensor([mine, -mine])
    dist.all_reduce(lowest, dist.ReduceOp.MIN)
    if lowest[0] != -lowest[1]:
        raise RunError("the ranks have made different plans: give all nodes the same data and package versions")
