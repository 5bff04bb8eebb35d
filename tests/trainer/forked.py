"""Ranks forked from one process that has imported everything, so that they start in a moment."""

import itertools
import multiprocessing
import os
import random
import socket
import sys
import threading
from contextlib import suppress
from pathlib import Path

import torch
from tqdm import tqdm

from data.errors import UserError
from tests.patience import PATIENCE
from trainer import ranks
from trainer.checkpoints import folder as checkpoint
from trainer.config.tree import load_config
from trainer.loop import train

CONTEXT = multiprocessing.get_context("forkserver")
SLOW = ["sklearn.datasets", "trainer.engines.zero", "deepspeed.runtime.zero.muon.muon_optimizer"]  # to import
CONTEXT.set_forkserver_preload(["pytest", "tests.trainer.forked", *SLOW])

TINY = Path(__file__).parent / "tiny.yaml"
# DeepSpeed keeps the weights in many groups, as it does those of large networks
GROUPS = "deepspeed={zero_optimization: {allgather_bucket_size: 10_000, sub_group_size: 5_000}}"


_NUMBERS = itertools.count(random.SystemRandom().randrange(1_300))


def _port():
    """One that nobody else takes: above those of cluster.sh, below those of the kernel, and this worker's own."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % 2
    for number in _NUMBERS:
        port = 30_100 + 1_300 * worker + number % 1_300
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("", port))
            return port
    raise AssertionError


def train_tiny(*overrides):
    train(load_config(TINY, overrides))


def train_hasty(*overrides):
    """The same where those that are gone are not waited for."""
    ranks.GRACE = 0.1
    train_tiny(*overrides)


def _rank(rank, world_size, ports, errors, function, calls):
    world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in world.items()}, MASTER_ADDR="127.0.0.1")
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own: who is killed with the one that forks share keeps it for ever
    try:
        for port, arguments in zip(ports, calls, strict=True):
            os.environ["MASTER_PORT"] = str(port)
            function(*arguments)
    except UserError as error:
        sys.exit(f"error: {error}")


class Forked:
    """Starts ranks that call a function of a module; whatever still lives at the end of the test is killed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.processes, self._errors = folder, [], {}

    def start(self, world_size, function, *arguments):
        return self._start(world_size, function, [arguments])

    def _start(self, world_size, function, calls):
        ports, started = [_port() for _ in calls], []
        for rank in range(world_size):
            errors = self.folder / f"stderr-{len(self.processes) + rank}"
            process = CONTEXT.Process(target=_rank, args=(rank, world_size, ports, errors, function, calls))
            process.start()
            self._errors[process] = errors
            started.append(process)
        self.processes += started
        return started

    def finish(self, processes):
        """[(exit code, stderr)] of the ranks, which have to end by themselves."""
        for process in processes:
            process.join(PATIENCE)
        codes = [process.exitcode for process in processes]
        errors = [self._errors[process].read_text() for process in processes]
        assert None not in codes, ("still running", codes, errors)
        return list(zip(codes, errors, strict=True))

    def run(self, world_size, function, *arguments):
        """To the end, which has to be good; the stderr of rank 0."""
        return self.run_many(world_size, function, arguments)

    def run_many(self, world_size, function, *calls):
        """The same of many calls, one after another in the same processes."""
        ended = self.finish(self._start(world_size, function, calls))
        assert all(code == 0 for code, _ in ended), ended
        return ended[0][1]

    def fail(self, world_size, function, *arguments):
        """To the end, which has to be the same line `error: ...` on all ranks; that line."""
        return one_line(self.finish(self.start(world_size, function, *arguments)))

    def signal(self, processes, number):
        for process in processes:
            os.kill(process.pid, number)

    def kill(self):
        for process in self.processes:
            process.kill()


def one_line(ended):
    """What all ranks say, given their (exit code, stderr): one line and no traceback."""
    for code, errors in ended:
        assert code == 1 and "Traceback" not in errors, errors
    lines = {errors.strip().splitlines()[-1] for _, errors in ended}
    assert len(lines) == 1, lines
    line = lines.pop()
    assert line.startswith("error: ")
    return line


def positions(folder):
    return [int(path.name) for path in checkpoint.find(folder)[0]]


def newest_is_good(folder):
    complete, _ = checkpoint.find(folder)
    if complete:
        checkpoint.verify(complete[-1])
    return bool(complete)
