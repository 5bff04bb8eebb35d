"""This process's place among the ranks of the run: torch.distributed from torchrun's standard environment."""

import os
import re
import resource
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, Store
from torch.distributed.rendezvous import rendezvous

from data.errors import UserError
from trainer.errors import RunError, add_facts, first_line

GRACE = 3.0  # seconds in which ranks must notice a failure, or else count as absent
T = TypeVar("T")
_BROKEN = re.compile(r"Connection|gloo|monitoredBarrier|NCCL|[Tt]imed? ?out|Broken pipe")
_kept: dict[str, dist.ProcessGroup | None] = {}


@dataclass(frozen=True)
class Ranks:
    """This process's rank out of `world_size`, its device, and the number of ranks on its machine."""

    rank: int
    world_size: int
    device: torch.device
    local_world_size: int = 1


def local_device() -> torch.device:
    """Return the device of a process that works without the others: one of the machine's GPUs, or its CPUs."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


@contextmanager
def process_group(timeout: float = 1800) -> Iterator[Ranks]:
    """Join the ranks named by torchrun's variables (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR,
    MASTER_PORT); without them, a world of one.

    Use GPUs if there is one for each rank of the machine, else its CPUs; NCCL for tensors on GPUs, else gloo. A rank
    that waits for another for more than `timeout` seconds raises. The attributes of a communication error say who is at
    fault (see `trainer.errors.add_facts`).
    """
    rank, world_size, local_world_size = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 1))
    )
    _allow_files()
    device, backend = torch.device("cpu"), "gloo"
    if torch.cuda.device_count() >= local_world_size:
        device, backend = local_device(), "cpu:gloo,cuda:nccl"
    elif torch.cuda.is_available() and rank % local_world_size == 0:
        seen = f"{torch.cuda.device_count()} GPUs for {local_world_size} ranks"
        warnings.warn(f"CPUs are used: this process sees {seen}; let each see all of its machine", stacklevel=3)
    limit = timedelta(seconds=timeout)
    # NCCL would kill the process, while gloo, used for the vote at each step, raises and names ranks that do not answer
    longer = 2 * limit if device.type == "cuda" else limit
    store: Store = HashStore()
    ended = False
    try:
        if world_size > 1:
            store, _, _ = next(rendezvous("env://", rank, world_size, timeout=limit))
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=longer)
        # keep one: DDP would free the last one with the GIL held, and wait for threads that may wait for the GIL
        _kept["group"] = dist.group.WORLD
        ones = torch.ones((), device=device)
        dist.all_reduce(ones)
        if ones != world_size:
            raise RuntimeError(f"{world_size} ranks add up to {ones}: this machine or its network computes wrong")
        yield Ranks(rank, world_size, device, local_world_size)
        dist.barrier()  # a rank that leaves early closes connections that others still use
        ended = True
    except Exception as error:
        if at_fault := _at_fault(error):
            add_facts(error, at_fault=at_fault)
        if at_fault == "peer" and dist.is_initialized() and (absent := _absent(store, rank, world_size)):
            add_facts(error, absent_ranks=absent)
            error.add_note(f"no answer from ranks {', '.join(map(str, absent))}")
        raise
    finally:
        deepspeed = sys.modules.get("deepspeed")
        if device.type == "cuda" and world_size > 1 and not ended:
            pass  # NCCL would wait for ranks that are still running, and this rank's error would never show
        elif deepspeed and deepspeed.comm.is_initialized():
            deepspeed.comm.destroy_process_group()  # so that DeepSpeed forgets the groups that it remembers
        elif dist.is_initialized():
            dist.destroy_process_group()


def _at_fault(error: Exception) -> Literal["peer", "port"] | None:
    """Return whether an error comes from another rank's end or silence, or from a port that was taken.

    torch gives some of these errors a class, but no code; gloo's are RuntimeErrors that differ only in their text. This
    is the only place that reads it.
    """
    message = first_line(error)
    if getattr(error, "final", False):
        return None
    if isinstance(error, dist.DistNetworkError) and "EADDRINUSE" in message:
        return "port"
    if isinstance(error, dist.DistError | ConnectionError | TimeoutError) or _BROKEN.search(message):
        return "peer"
    return None


def _allow_files() -> None:
    """Raise this process's limit on open files: gloo opens one for each other rank in each of several groups."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _absent(store: Store, rank: int, world_size: int) -> list[int]:
    """Return the ranks that do not notice the failure within a moment of this one."""
    found = [[0]]  # rank 0 keeps the store: if the store does not answer, nor does rank 0

    def ask() -> None:
        with suppress(RuntimeError):
            store.set(f"failed/{rank}", "")
            time.sleep(GRACE)
            found.append([other for other in range(world_size) if not store.check([f"failed/{other}"])])

    asking = threading.Thread(target=ask, daemon=True)  # the store has no time limit
    asking.start()
    asking.join(2 * GRACE)
    return found[-1]


def from_rank_0(function: Callable[[], T]) -> T:
    """Call `function` on rank 0 alone and return its result on all ranks; its UserError is a RunError on all of them.

    So anything that depends on files, which ranks may see at different times, has one answer.
    """
    box: list = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = function()
        except UserError as error:
            box[1] = str(error)
    dist.broadcast_object_list(box)
    if box[1] is not None:
        raise RunError(box[1])
    return box[0]
