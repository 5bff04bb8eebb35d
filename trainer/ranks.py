"""Who this process is among the ranks of the run: torch.distributed from torchrun's standard environment."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Ranks:
    """This process's rank of `world_size`, and its device."""

    rank: int
    world_size: int
    device: torch.device


@contextmanager
def process_group() -> Iterator[Ranks]:
    """Join the ranks named by RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; without them, a world of one.

    NCCL for tensors on GPUs, gloo for those on CPUs.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device, backend = torch.device("cpu"), "gloo"
    if torch.cuda.is_available():
        device, backend = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    store = dist.HashStore() if world_size == 1 else None
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    try:
        yield Ranks(rank, world_size, device)
        dist.barrier()  # a rank that leaves early closes connections that others still use
    finally:
        dist.destroy_process_group()
