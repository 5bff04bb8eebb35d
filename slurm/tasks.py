"""Run the tasks of a job until all have ended: by srun on its nodes, or as processes of this machine."""

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from slurm.snapshot import python_path

PATIENCE = 15.0  # seconds that the others have to end when a task has failed
POLL = 0.1  # seconds
GPUS = "GPUS_PROMISED"  # the environment variable that tells a task how many GPUs its node should have


def run_by_srun(
    logs: Path,
    code: Path,
    cpus_per_task: int | None,
    gpus: int,
    deadline: Callable[[], float],
    watch: Callable[[], None],
) -> dict[int, str]:
    """Run all tasks of this job's allocation and return how those ended that ended badly, by rank, the first to do so
    first.

    A task that fails takes the others with it. gpus: how many each node should have. deadline: when all are given up,
    in seconds since 1970; asked again when it has come, because the time limit may have been moved. watch: called all
    the time.
    """
    command = ["srun", "--kill-on-bad-exit=1", "--unbuffered", "--open-mode=append", f"--output={logs}/%t.log"]
    if cpus_per_task:
        command.append(f"--cpus-per-task={cpus_per_task}")  # which srun does not take over from sbatch
    env = os.environ | _meeting_point(socket.gethostname(), code) | {GPUS: str(gpus)}
    env.pop("RANK", None)  # of a task that submitted this job
    with (logs / "srun.log").open("w") as errors:
        srun = subprocess.Popen([*command, *_task_command(logs)], env=env, stderr=errors)
    end, late = deadline(), False
    while srun.poll() is None:
        watch()
        if time.time() > end and not late:
            end = deadline()  # as it is now
            late = time.time() > end
            if late:
                srun.kill()
        time.sleep(POLL)
    text = (logs / "srun.log").read_text()
    bad_ends: dict[int, str] = {}
    for host, ranks, how in re.findall(r"srun: error: (\S+): tasks? ([\d,-]+): (.*)", text):
        bad_ends |= {rank: f"{how} on {host}" for rank in _expand(ranks) if rank not in bad_ends}
    if late:
        return {0: "the time limit came before the tasks had saved"}
    if srun.returncode and not bad_ends:
        bad_ends[0] = (text.strip().splitlines() or [f"srun: exit code {srun.returncode}"])[-1]
    return bad_ends


def run_here(
    logs: Path, code: Path, tasks: int, visible_gpus: str | None, stop_requested: Callable[[], bool]
) -> dict[int, str]:
    """Run that many processes of this machine, and return what `run_by_srun` does. A request to stop is passed on."""
    env = os.environ | _meeting_point("127.0.0.1", code)
    env |= {"WORLD_SIZE": str(tasks), "LOCAL_WORLD_SIZE": str(tasks)}
    env.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // tasks)))
    env.pop("CUDA_VISIBLE_DEVICES", None)  # submitit's: the first ones of the machine
    env |= {"CUDA_VISIBLE_DEVICES": visible_gpus} if visible_gpus is not None else {}
    processes = []
    for rank in range(tasks):
        with (logs / f"{rank}.log").open("a") as log:
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(subprocess.Popen(_task_command(logs), env=env | place, stdout=log, stderr=log))
    bad_ends: dict[int, str] = {}
    passed_on, deadline = False, float("inf")
    while True:
        running = [process for process in processes if process.poll() is None]
        failed = {rank: process.returncode for rank, process in enumerate(processes) if process.returncode}
        bad_ends |= {rank: _how(code) for rank, code in failed.items() if rank not in bad_ends}
        if not running:
            return bad_ends
        if bad_ends and deadline == float("inf"):
            deadline = time.monotonic() + PATIENCE
        if stop_requested() and not passed_on:
            passed_on = True
            _signal(running, signal.SIGTERM)
        if time.monotonic() > deadline:
            _signal(running, signal.SIGKILL)
        time.sleep(POLL)


def _meeting_point(host: str, code: Path) -> dict[str, str]:
    """Return the variables by which ranks find one another. Rank 0 runs on this machine, where a port is known to be
    free."""
    return {"PYTHONPATH": python_path(code), "MASTER_ADDR": host, "MASTER_PORT": str(free_port())}


def _task_command(logs: Path) -> list[str]:
    """Return the command of a task. -P: without the code of the working folder, which the user may be editing."""
    return [sys.executable, "-P", "-u", "-m", "slurm.task", str(logs)]


def free_port() -> int:
    """Return a TCP port that is free on all addresses of this machine, below those that the kernel gives to clients."""
    dual = socket.has_dualstack_ipv6()
    for _ in range(100):
        port = random.SystemRandom().randrange(10_000, 30_000)
        with suppress(OSError), socket.socket(socket.AF_INET6 if dual else socket.AF_INET) as probe:
            if dual:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            probe.bind(("", port))
            return port
    raise OSError("no TCP port from 10000 to 29999 is free")


def _signal(processes: list[subprocess.Popen], number: signal.Signals) -> None:
    for process in processes:
        process.send_signal(number)  # does nothing if it has ended


def _how(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _expand(ranks: str) -> list[int]:
    """'0,3-5' -> [0, 3, 4, 5]."""
    ends = [[int(end) for end in part.split("-")] for part in ranks.split(",")]
    return [rank for first, *last in ends for rank in range(first, (last or [first])[0] + 1)]
