"""Looking at runs that were submitted, and ending them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TextIO

from slurm.errors import LaunchError
from slurm.files import show_new, write_whole
from slurm.queue import queue_state
from slurm.state import STATE, RunState, describe, read_state, write_state
from slurm.supervise import STOP

_JOB = "job"  # a file in the run folder: Slurm's number of its job, or "local PID"


def note_job(run: Path, number: str, cluster: Literal["local", "slurm"]) -> None:
    """Which job does a run, or here, which process."""
    write_whole(run / _JOB, f"{number}\n" if cluster == "slurm" else f"local {number}\n")


def job_of(run: Path) -> str | None:
    """Slurm's number of a run's job; None where it was run without Slurm."""
    path = run / _JOB
    number = path.read_text().strip() if path.is_file() else ""
    return number if number[:1].isdigit() else None


def runs_in(folder: Path) -> list[Path]:
    """The run of this folder, or those of a sweep below it. LaunchError if there is none."""
    runs = [folder] if (folder / STATE).is_file() else sorted(path.parent for path in folder.glob(f"*/{STATE}"))
    if not runs:
        raise LaunchError(f"{folder}: no run was submitted there (no {STATE} in it)")
    return runs


def status(folder: Path) -> str:
    """What became of the runs of a folder."""
    parts = []
    for run in runs_in(folder):
        job = job_of(run)
        queued = f"\n  job {job}: {queue_state(job) or 'not in the queue'}" if job else ""  # Slurm may not be here
        parts.append(describe(run, read_state(run)) + queued)
    return "\n".join(parts)


def cancel(folder: Path) -> None:
    """Have the runs of a folder save and end; those that wait in the queue end at once."""
    for run in runs_in(folder):
        state, job = read_state(run), job_of(run)
        if state.ended:
            continue
        (run / STOP).touch()  # so that it is not requeued
        if job is None:
            os.kill(int((run / _JOB).read_text().split()[1]), signal.SIGTERM)
        elif queue_state(job) == "RUNNING":
            subprocess.run(["scancel", "--signal=USR2", job], check=True)
        else:
            subprocess.run(["scancel", job], check=True)
            write_state(run, state.model_copy(update={"state": "stopped", "why": "cancelled in the queue"}))


def follow(run: Path, ended: Callable[[], bool], out: TextIO = sys.stderr) -> RunState:
    """Show what rank 0 writes until the run has ended; its last state."""
    shown, path = 0, None
    while True:
        done = ended()  # asked before the last look at the log
        state = read_state(run)
        log = Path(state.logs) / "0.log"
        shown, path = show_new(log, shown if log == path else 0, out), log
        if done:
            return state
        time.sleep(0.2)
