"""Run one function in many processes, without supervision: on this machine, or in job arrays of Slurm, by submitit."""

import math
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import submitit
from submitit.core.utils import FailedJobError

from slurm.errors import LaunchError
from slurm.files import show_new
from slurm.options import ClusterOptions
from slurm.records import clear_records, failed_record, read_records, write_record
from slurm.sbatch import check_cluster, sbatch_parameters, slurm_prefixed
from slurm.tasks import free_port

PATIENCE = 10.0  # seconds that the other tasks of a local job have to end when one has failed


def submit_here(folder: Path, processes: int, gpus: int, function: Callable[[], Any]) -> submitit.Job:
    """Start `function()` in processes of this machine that use so many GPUs together; `follow` waits for them.

    Logs go to `folder`: a new one for each submission, because job numbers repeat.
    """
    executor = submitit.AutoExecutor(folder=folder, cluster="local")
    executor.update_parameters(tasks_per_node=processes, gpus_per_node=gpus, timeout_min=60 * 24 * 365)
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # behind a shell's `&`: the job would not notice a cancel
        signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes)))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")  # submitit would replace it by the first ones of the machine
    clear_records(folder)
    return executor.submit(_run_here, folder, free_port(), visible, function)


def submit_array(
    folder: Path,
    name: str,
    tasks_per_node: int,
    gpus_per_node: int,
    options: ClusterOptions,
    functions: list[Callable[[], Any]],
) -> list[submitit.Job]:
    """Submit a job array of Slurm: for each function a job of one node that calls it in every task. Logs go to
    `folder`."""
    check_cluster(options, 1, gpus_per_node)
    executor = submitit.AutoExecutor(folder=folder, cluster="slurm")
    srun = ["--kill-on-bad-exit=1"]  # a task that fails takes the others with it, which would wait for it
    if options.cpus_per_task:
        srun.append(f"--cpus-per-task={options.cpus_per_task}")  # which srun does not take over from sbatch
    parameters = sbatch_parameters(options, name, 1, tasks_per_node, gpus_per_node)
    executor.update_parameters(slurm_srun_args=srun, **slurm_prefixed(parameters))
    with sbatch_errors(), executor.batch():
        return [executor.submit(_run_on_node, function) for function in functions]


def call_share(function: Callable[..., None], arguments: dict[str, Any], first: int, processes: int) -> None:
    """Call the function in each process of a job, as number `first` + rank of `processes` that share some work."""
    function(**arguments, process=first + int(os.environ["RANK"]), processes=processes)


@contextmanager
def sbatch_errors() -> Iterator[None]:
    """Turn what sbatch says into a LaunchError."""
    try:
        yield
    except FailedJobError as error:
        raise LaunchError(str(error).strip().splitlines()[-1]) from None


def _run_here(logs: Path, port: int, visible_gpus: str | None, function: Callable[[], Any]) -> Any:
    """Call the function in a process of this machine. If it fails, leave a record."""
    if visible_gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible_gpus
    rank = _set_ranks("127.0.0.1", port)
    try:
        return function()
    except (Exception, SystemExit) as error:
        write_record(logs, rank, failed_record(socket.gethostname(), error))
        raise


def _run_on_node(function: Callable[[], Any]) -> Any:
    """Call the function in a task of a job on Slurm."""
    job = submitit.JobEnvironment()
    # a port of the job's own, below those that the kernel gives to clients
    _set_ranks(job.hostnames[0], 10_000 + int(job.raw_job_id) % 20_000)
    return function()


def _set_ranks(host: str, port: int) -> int:
    """Set torchrun's variables, and return this process's rank."""
    job = submitit.JobEnvironment()
    os.environ.update(
        RANK=str(job.global_rank),
        WORLD_SIZE=str(job.num_tasks),
        LOCAL_RANK=str(job.local_rank),
        LOCAL_WORLD_SIZE=str(job.num_tasks // job.num_nodes),
        MASTER_ADDR=host,
        MASTER_PORT=str(port),
    )
    return job.global_rank


def follow(job: submitit.Job, out: TextIO = sys.stderr) -> Any:
    """Copy to `out` what task 0 of a job of `submit_here` writes to stderr, and return its result. Raise LaunchError if
    a task failed."""
    log = job.task(0).paths.stderr
    logs = log.parent
    shown, failed_at = 0, None
    try:
        while True:
            done = job.done()  # before the last look at the log, so that nothing is missed
            shown = show_new(log, shown, out)
            if done:
                break
            if failed_at is None and read_records(logs):
                failed_at = time.monotonic()
            if failed_at is not None and time.monotonic() - failed_at > PATIENCE:
                failed_at = math.inf  # once: submitit ends the tasks step by step
                job.cancel()
            time.sleep(0.2)
    except KeyboardInterrupt:
        job.cancel()
        raise
    if failures := read_records(logs):
        rank, record = min(failures.items(), key=lambda item: (item[1].at_fault == "peer", item[1].written_at))
        raise LaunchError(f"{record.error} (task {rank}; logs in {logs})")
    for rank in range(job.num_tasks):  # a task that was killed leaves no record
        if error := job.task(rank).exception():
            raise LaunchError(f"{str(error).strip().splitlines()[0]} (task {rank}; logs in {logs})")
    return job.task(0).result()
