"""Look at runs that were submitted, and end them."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TextIO

from slurm.errors import LaunchError
from slurm.files import show_new, write_text
from slurm.queue import queue_state
from slurm.state import STATE, RunState, describe, read_state, write_state
from slurm.supervise import STOP

ASK_QUEUE = 30.0  # seconds between two questions to Slurm
NOT_THERE = "not in the queue"
_JOB = "job"  # a file in the run folder: Slurm's number of its job, or "local PID HOST" of its supervisor


def note_job(run: Path, number: str, cluster: Literal["local", "slurm"]) -> None:
    """Note in the run folder which job does a run: Slurm's number, or on this machine the supervisor's process."""
    write_text(run / _JOB, f"{number}\n" if cluster == "slurm" else f"local {number} {socket.gethostname()}\n")


def job_of(run: Path) -> str | None:
    """Return Slurm's number of a run's job; None if it was run without Slurm."""
    path = run / _JOB
    number = path.read_text().strip() if path.is_file() else ""
    return number if number[:1].isdigit() else None


def runs_in(folder: Path) -> list[Path]:
    """Return the run of this folder, or those of the sweep in it. Raise LaunchError if there is none."""
    runs = [folder] if (folder / STATE).is_file() else sorted(path.parent for path in folder.glob(f"*/{STATE}"))
    if not runs:
        raise LaunchError(f"{folder}: no run was submitted there (no {STATE} in it)")
    return runs


def status(folder: Path) -> str:
    """Return how the runs of a folder are doing, as text."""
    parts = []
    for run in runs_in(folder):
        job = job_of(run)
        parts.append(describe(run, read_state(run)) + (f"\n  job {job}: {_queued(job)}" if job else ""))
    return "\n".join(parts)


def _queued(job: str) -> str:
    try:
        return queue_state(job) or NOT_THERE
    except LaunchError as error:  # the state file is worth showing without Slurm, too
        return str(error)


def cancel(folder: Path) -> None:
    """Have the runs of a folder save and end; those that wait in the queue end at once. When all have been asked, raise
    LaunchError about those that could not be found."""
    wrong = []
    for run in runs_in(folder):
        if not read_state(run).ended:
            (run / STOP).touch()  # so that it is not requeued
            try:
                _cancel(run)
            except LaunchError as error:
                wrong.append(f"{run}: {error}")
    if wrong:
        raise LaunchError("; ".join(wrong))


def _cancel(run: Path) -> None:
    job = job_of(run)
    if job is None:
        pid, host = _process(run)
        if not _is_here(pid):
            raise LaunchError(f"its process {pid} is not on this machine; it runs on {host}, or has ended")
        os.kill(int(pid), signal.SIGTERM)
    elif queue_state(job) == "RUNNING":
        _scancel("--signal=USR2", job)
    else:
        _scancel(job)
        stopped = {"state": "stopped", "why": "cancelled in the queue"}
        write_state(run, read_state(run).model_copy(update=stopped))


def _process(run: Path) -> tuple[str, str]:
    """Return (number, host) of the process that supervises a run without Slurm."""
    words = (run / _JOB).read_text().split() if (run / _JOB).is_file() else []
    return words[1] if words else "?", words[2] if len(words) > 2 else "another one"


def _is_here(pid: str) -> bool:
    try:
        return b"submitit" in Path(f"/proc/{pid}/cmdline").read_bytes()  # the number may by now be another process's
    except OSError:  # it has ended
        return False


def _scancel(*arguments: str) -> None:
    done = subprocess.run(["scancel", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise LaunchError(f"scancel: {done.stderr.strip()}")


def lost_or_ended(run: Path) -> Callable[[], bool]:
    """Return a function that tells whether a run has ended, or has lost its job (Slurm is asked every `ASK_QUEUE`
    seconds) or its process."""
    asked = time.monotonic()

    def ended() -> bool:
        nonlocal asked
        job = job_of(run)
        if read_state(run).ended:
            return True
        if job is None:
            pid, host = _process(run)
            return host == socket.gethostname() and not _is_here(pid)
        if time.monotonic() - asked < ASK_QUEUE:
            return False
        asked = time.monotonic()
        return _queued(job) == NOT_THERE  # false while Slurm does not answer

    return ended


def follow(run: Path, ended: Callable[[], bool], out: TextIO = sys.stderr) -> RunState:
    """Copy rank 0's log to `out` until `ended()`; return the run's last state."""
    shown, path = 0, Path()
    while True:
        done = ended()  # before the last look at the log, so that nothing is missed
        state = read_state(run)
        log = Path(state.logs) / "0.log"
        shown, path = show_new(log, shown if log == path else 0, out), log
        if done:
            return state
        time.sleep(0.2)
