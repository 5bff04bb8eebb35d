"""Run one function in many processes, here or on Slurm nodes, by submitit."""

import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TextIO

import submitit
from submitit.core.utils import FailedJobError, pickle_load

from slurm.errors import LaunchError
from slurm.files import show_new
from slurm.options import ClusterOptions
from slurm.sbatch import check_cluster, sbatch_parameters, slurm_prefixed
from slurm.tasks import free_port

PATIENCE = 10.0  # seconds that the other tasks of a local job have to end when one has failed


def make_executor(
    cluster: Literal["local", "slurm"],
    folder: Path,
    name: str,
    nodes: int,
    tasks_per_node: int,
    gpus_per_node: int,
    options: ClusterOptions,
) -> submitit.AutoExecutor:
    """A submitit executor for `nodes` x `tasks_per_node` processes whose logs go to `folder` (new for each submission,
    because job numbers may come again)."""
    if cluster == "local" and nodes > 1:
        raise LaunchError(f"--nodes {nodes}: --cluster local is this one machine; use --procs for more processes")
    if cluster == "slurm":
        check_cluster(options, nodes, gpus_per_node)
    executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
    if cluster == "local":
        executor.update_parameters(tasks_per_node=tasks_per_node, gpus_per_node=gpus_per_node)
        executor.update_parameters(timeout_min=60 * 24 * 365)
        return executor
    parameters = sbatch_parameters(options, name, nodes, tasks_per_node, gpus_per_node)
    srun = ["--kill-on-bad-exit=1"]  # a task that fails takes the others with it, which would wait for it
    if options.cpus_per_task:
        srun.append(f"--cpus-per-task={options.cpus_per_task}")  # which srun does not take over from sbatch
    executor.update_parameters(slurm_srun_args=srun, **slurm_prefixed(parameters))
    return executor


def submit(executor: submitit.AutoExecutor, function: Callable[..., Any], *arguments: Any) -> submitit.Job:
    """Start `function(*arguments)` in every process of the executor, with torchrun's environment variables set."""
    if executor.cluster == "slurm":
        with sbatch_errors():
            return executor.submit(_run_task, None, None, function, *arguments)
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # behind a shell's `&`: the job would not hear its cancelling
        signal.signal(signal.SIGINT, signal.default_int_handler)
    tasks = executor.parameters["tasks_per_node"]
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // tasks)))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")  # submitit would replace it by the first ones of the machine
    return executor.submit(_run_task, free_port(), visible, function, *arguments)


def submit_array(executor: submitit.AutoExecutor, functions: list[Callable[[], Any]]) -> list[submitit.Job]:
    """Start each function as a job of its own, in every process of the executor: a job array of Slurm."""
    with sbatch_errors(), executor.batch():
        return [executor.submit(_run_task, None, None, function) for function in functions]


def call_share(function: Callable[..., None], arguments: dict[str, Any], first: int, processes: int) -> None:
    """In each process of a job: call the function as number `first` + rank of `processes` that share some work."""
    function(**arguments, process=first + int(os.environ["RANK"]), processes=processes)


@contextmanager
def sbatch_errors() -> Iterator[None]:
    """What sbatch says, as a LaunchError."""
    try:
        yield
    except FailedJobError as error:
        raise LaunchError(str(error).strip().splitlines()[-1]) from None


def _run_task(port: int | None, visible_gpus: str | None, function: Callable[..., Any], *arguments: Any) -> Any:
    """What each process does: tell torch.distributed who it is, then call the function."""
    job = submitit.JobEnvironment()
    if visible_gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible_gpus
    os.environ.update(
        RANK=str(job.global_rank),
        WORLD_SIZE=str(job.num_tasks),
        LOCAL_RANK=str(job.local_rank),
        LOCAL_WORLD_SIZE=str(job.num_tasks // job.num_nodes),
        MASTER_ADDR=job.hostnames[0] if port is None else "127.0.0.1",
        # on Slurm a port of the job's own, below those that the kernel gives to clients
        MASTER_PORT=str(port or 10_000 + int(job.raw_job_id) % 20_000),
    )
    return function(*arguments)


def follow(job: submitit.Job, out: TextIO = sys.stderr) -> Any:
    """Show what task 0 writes to stderr until the job ends, and return its result. LaunchError if a task failed."""
    log = job.task(0).paths.stderr
    tasks = [job.task(i) for i in range(job.num_tasks)]
    shown, failed_at = 0, None
    try:
        while True:
            done = job.done()  # asked before the last look at the log
            shown = show_new(log, shown, out)
            if done:
                break
            if failed_at is None and any(_has_failed(task) for task in tasks):
                failed_at = time.monotonic()
            if failed_at is not None and time.monotonic() - failed_at > PATIENCE:
                failed_at = math.inf  # once: submitit ends the tasks step by step
                job.cancel()
            time.sleep(0.2)
    except KeyboardInterrupt:
        job.cancel()
        raise
    failures = [(i, task.exception()) for i, task in enumerate(tasks) if task.exception() is not None]
    if failures:
        raise LaunchError(_cause(failures, log.parent))
    return job.task(0).result()


def _has_failed(task: submitit.Job) -> bool:
    """Whether a task of a job that may still run has left an error behind."""
    result = task.paths.result_pickle
    return result.exists() and pickle_load(result)[0] == "error"


def _cause(failures: list[tuple[int, Exception]], logs: Path) -> str:
    """One line for a failed job: a task's own error, rather than being ended, or the connection that broke with it."""

    def remote(failure: tuple[int, Exception]) -> tuple[bool, bool]:
        ended = not isinstance(failure[1], FailedJobError)  # it left no error behind
        return ended, bool(re.search("Connection|DistBackend|NCCL", str(failure[1])))

    rank, error = min(failures, key=remote)
    raised = [line for line in str(error).splitlines() if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
    return f"{raised[-1] if raised else str(error).strip()} (task {rank}; logs in {logs})"
