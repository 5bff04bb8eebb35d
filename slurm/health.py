"""Whether this node is fit: each task checks at its start. A bad node is named and, if it fails again, left out."""

import os
import shutil
import socket
import tempfile
import time
from pathlib import Path

import torch

from slurm.tasks import GPUS

FREE_BYTES = 1 << 30  # of the run's file system, and of the node's own for temporary files
CLOCK_SKEW = 60.0  # seconds


class NodeError(Exception):
    """This node is not fit; another one may be."""

    at_fault = "node"  # see slurm/records.py


def check_node(folder: Path) -> None:
    """Raise NodeError if this node's disk, clock or GPU is not fit. `folder` is on the file system that nodes share."""
    host = socket.gethostname()
    for place in (folder, Path(tempfile.gettempdir())):
        free = shutil.disk_usage(place).free
        if free < FREE_BYTES:
            raise NodeError(f"{host}: {place} has {free / 2**30:.2f} GiB free; 1 GiB is needed")
    _check_clock(host, folder)
    found, promised = torch.cuda.device_count(), int(os.environ.get(GPUS, "0"))
    if found < promised:
        raise NodeError(f"{host}: {found} of its {promised} GPUs can be used")
    if torch.cuda.is_available():
        _check_gpu(host, int(os.environ["LOCAL_RANK"]) % found)


def _check_clock(host: str, folder: Path) -> None:
    """Compare with the file server's clock, the one that all nodes can see."""
    probe = folder / f".clock.{host}.{os.getpid()}"
    probe.touch()
    skew = time.time() - probe.stat().st_mtime
    probe.unlink()
    if abs(skew) > CLOCK_SKEW:
        raise NodeError(f"{host}: its clock is {skew:+.0f} s from that of the file server")


def _check_gpu(host: str, number: int) -> None:
    try:
        x = torch.arange(64, device=f"cuda:{number}", dtype=torch.float32)
        answer = float((x[:, None] @ x[None, :]).sum())
    except RuntimeError as error:
        raise NodeError(f"{host}: GPU {number} does not answer: {str(error).splitlines()[0]}") from None
    if answer != (63 * 32) ** 2:
        raise NodeError(f"{host}: GPU {number} computes wrong: {answer} instead of {(63 * 32) ** 2}")
