"""Submit runs. Each has a supervisor (slurm/supervise.py) that starts its tasks: in a job of Slurm, in a member of a
job array, or on this machine."""

import fcntl
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

import cloudpickle
import submitit
from submitit.slurm.slurm import _make_sbatch_string

from slurm.control import job_of, note_job
from slurm.errors import LaunchError
from slurm.files import write_text
from slurm.launch import sbatch_errors
from slurm.options import ClusterOptions
from slurm.queue import queue_state
from slurm.sbatch import check_cluster, sbatch_parameters, slurm_prefixed
from slurm.snapshot import python_path, take_snapshot
from slurm.state import RunState, find_state, restore_state, write_state
from slurm.supervise import STOP, Job, supervise

SLACK = 60.0  # seconds by which Slurm may send its signal early


@dataclass(frozen=True)
class Run:
    """A run folder, and what every process calls to do the run (see slurm/task.py)."""

    folder: Path
    function: Callable[..., str]
    arguments: tuple
    lock: Path  # the file that a process holds while it writes the run


def submit_runs(
    runs: list[Run],
    root: Path,
    cluster: Literal["local", "slurm"],
    nodes: int,
    tasks_per_node: int,
    gpus_per_node: int,
    options: ClusterOptions,
    parallel: int,
) -> list[submitit.Job]:
    """Submit runs and return their jobs: more than one run as a job array, of which `parallel` run at once.

    `root` is the folder of the run, or the one that holds all runs; the snapshot of the code and submitit's files go
    there. Raise LaunchError if anything that can be checked now is wrong; the runs are then as they were before.
    """
    if cluster == "slurm":
        check_cluster(options, nodes, gpus_per_node)
    for folder in {root, *(run.folder for run in runs)}:
        check_folder(folder, cluster)
    for run in runs:
        check_idle(run)
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S-%f")
    code = take_snapshot(root / "code" / stamp)
    before = [find_state(run.folder) for run in runs]
    jobs = [_prepare(run, stamp, code, tasks_per_node, gpus_per_node, options, cluster) for run in runs]
    executor = _executor(cluster, root / "logs" / stamp, code)
    if cluster == "local":
        submitted = [executor.submit(supervise, job) for job in jobs]
    else:
        parameters = sbatch_parameters(options, root.name, nodes, tasks_per_node, gpus_per_node)
        executor.update_parameters(slurm_array_parallelism=parallel, **slurm_prefixed(parameters))
        try:
            with sbatch_errors():
                one = len(jobs) == 1
                submitted = [executor.submit(supervise, jobs[0])] if one else executor.map_array(supervise, jobs)
        except LaunchError:
            for run, state in zip(runs, before, strict=True):
                restore_state(run.folder, state)
            raise
    for run, job in zip(runs, submitted, strict=True):
        note_job(run.folder, job.job_id, cluster)
    return submitted


def batch_script(
    root: Path, nodes: int, tasks_per_node: int, gpus_per_node: int, options: ClusterOptions, runs: int, parallel: int
) -> str:
    """Return the script that `submit_runs` would give to sbatch."""
    logs, code = root / "logs" / "STAMP", root / "code" / "STAMP"
    parameters = sbatch_parameters(options, root.name, nodes, tasks_per_node, gpus_per_node)
    return _make_sbatch_string(
        command=f"{_python(code)} -u -m submitit.core._submit {shlex.quote(str(logs))}",
        folder=logs,
        use_srun=False,
        map_count=runs if runs > 1 else None,
        array_parallelism=parallel,
        **{name: value for name, value in parameters.items() if value is not None},
    )


def check_folder(folder: Path, cluster: Literal["local", "slurm"]) -> None:
    """Make the folder. Raise LaunchError if it cannot be written, or if nodes cannot see it."""
    if ":" in str(folder):
        raise LaunchError(f"run={folder}: to Python the : in it ends a path; set run= to another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / ".writable", "")
        (folder / ".writable").unlink()
    except OSError as error:
        raise LaunchError(f"run={folder}: cannot be written: {error.strerror}; set run= to another folder") from None
    if cluster == "slurm" and "%" in str(folder):
        raise LaunchError(f"run={folder}: Slurm would read the % in it as a pattern; set run= to another folder")
    if cluster == "slurm" and _file_system(folder) in ("tmpfs", "ramfs", "devtmpfs"):
        raise LaunchError(f"run={folder}: is in this machine's memory, where no node sees it; use a shared file system")


def check_idle(run: Run) -> None:
    """Raise LaunchError if a job of the same run is waiting or running, wherever it was submitted."""
    state, job = find_state(run.folder), job_of(run.folder)
    may_be_queued = state and not state.ended and shutil.which("squeue")  # the folder may be a copy, away from Slurm
    if may_be_queued and job and (queued := queue_state(job)):
        raise LaunchError(
            f"run={run.folder}: its job {job} is {queued.lower()}; wait for its end, or --cancel {run.folder}"
        )
    if run.lock.exists():
        with run.lock.open("a") as lock:
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                raise LaunchError(
                    f"run={run.folder}: another job is writing this run; wait for its end, or --cancel {run.folder}"
                ) from None
            except OSError:
                return  # the file system has no locks: the run warns of it


def _prepare(
    run: Run, stamp: str, code: Path, tasks: int, gpus: int, options: ClusterOptions, cluster: Literal["local", "slurm"]
) -> Job:
    logs = run.folder / "logs" / stamp
    logs.mkdir(parents=True, exist_ok=True)
    (logs / "task.pkl").write_bytes(cloudpickle.dumps((run.function, run.arguments)))
    (run.folder / STOP).unlink(missing_ok=True)
    write_state(run.folder, RunState(logs=str(logs)))
    return Job(
        run=run.folder,
        logs=logs,
        code=code,
        lock=run.lock,
        retries=options.retries if cluster == "slurm" else 0,
        on_slurm=cluster == "slurm",
        exclude=options.exclude or "",
        tasks=tasks,
        visible_gpus=os.environ.get("CUDA_VISIBLE_DEVICES"),
        cpus_per_task=options.cpus_per_task,
        gpus_per_node=gpus,
        seconds_to_stop=options.signal_delay + SLACK,
    )


def _executor(cluster: Literal["local", "slurm"], folder: Path, code: Path) -> submitit.AutoExecutor:
    if cluster == "local":
        executor = submitit.AutoExecutor(folder=folder, cluster="local")
        executor.update_parameters(timeout_min=60 * 24 * 365)
        return executor
    executor = submitit.AutoExecutor(folder=folder, cluster="slurm", slurm_python=_python(code))
    executor.update_parameters(slurm_use_srun=False)
    return executor


def _python(code: Path) -> str:
    """Return a command that runs the snapshot's code. -P: not the working folder's, which may be edited meanwhile."""
    return f"env PYTHONPATH={shlex.quote(python_path(code))} {shlex.quote(sys.executable)} -P"


def _file_system(folder: Path) -> str:
    """Return the type of the file system that a folder is on."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    above = [mount for mount in mounts if folder.resolve().is_relative_to(mount[1].encode().decode("unicode_escape"))]
    return max(above, key=lambda mount: len(mount[1]))[2]
