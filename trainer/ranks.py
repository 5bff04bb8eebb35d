"""Who this process is among the ranks of the run: torch.distributed from torchrun's standard environment."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from trainer.errors import RunError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process's rank of `world_size`, and its device."""

    rank: int
    world_size: int
    device: torch.device


@contextmanager
def process_group() -> Iterator[Ranks]:
    """Join the ranks named by torchrun's variables (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR,
    MASTER_PORT); without them, a world of one.

    On GPUs where there is one for each rank of the machine, else on its CPUs; NCCL for tensors on GPUs, else gloo.
    """
    rank, world_size, local_rank, local_world_size = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
    )
    device, backend = torch.device("cpu"), "gloo"
    if torch.cuda.device_count() >= local_world_size:
        device, backend = torch.device("cuda", local_rank), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    store = dist.HashStore() if world_size == 1 else None
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    try:
        yield Ranks(rank, world_size, device)
        dist.barrier()  # a rank that leaves early closes connections that others still use
    finally:
        dist.destroy_process_group()


def from_rank_0(function: Callable[[], T]) -> T:
    """Call it on rank 0 alone and give all ranks what it returns, or its RunError: what depends on files that ranks may
    see at different times has one answer."""
    box: list = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = function()
        except RunError as error:
            box[1] = str(error)
    dist.broadcast_object_list(box)
    if box[1] is not None:
        raise RunError(box[1])
    return box[0]
