"""Ask Slurm about jobs, and have it requeue the job that this process is part of."""

import os
import re
import signal
import subprocess
import time
from datetime import datetime
from typing import Literal

from slurm.errors import LaunchError

PATIENCE = 120.0  # seconds that slurmctld may be away


class SlurmError(Exception):
    """A command of Slurm failed; the message is what it printed."""


def requeue(excluded: str) -> None:
    """Have Slurm start this job again, without the hosts `excluded` (separated by commas)."""
    job = _this_job()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # also in scontrol: requeuing a job terminates it first
    if termination() in (None, "preempted"):
        scontrol("requeue", job)
    if excluded:
        scontrol("update", f"JobId={job}", f"ExcNodeList={excluded}")


def seconds_left() -> float:
    """Return the seconds until this job's time limit."""
    end = _fields()["EndTime"]
    return float("inf") if end == "Unknown" else datetime.fromisoformat(end).timestamp() - time.time()


def queue_state(job: str) -> str:
    """Return a job's state in the queue, for instance PENDING or RUNNING; "" if it is not there. Raise LaunchError if
    Slurm does not answer."""
    try:
        done = subprocess.run(["squeue", "--noheader", f"--jobs={job}", "--format=%T"], capture_output=True, text=True)
    except FileNotFoundError:
        raise LaunchError(f"squeue: not found, to ask for job {job}; do this on a Slurm login node") from None
    if done.returncode and "Invalid job id" not in done.stderr:
        raise LaunchError(f"squeue: {done.stderr.strip()}")
    return done.stdout.strip().partition("\n")[0]


def host_names() -> list[str]:
    """Return the names of this job's nodes, in Slurm's order."""
    return scontrol("show", "hostnames", os.environ["SLURM_JOB_NODELIST"]).split()


def scontrol(*arguments: str) -> str:
    """Return what scontrol prints; ask again while slurmctld, which may be busy or restarting, does not answer. Raise
    SlurmError if it refuses, or does not answer in time."""
    end, env = time.monotonic() + PATIENCE, os.environ | {"SLURM_TIME_FORMAT": "standard"}
    while True:
        done = subprocess.run(["scontrol", *arguments], env=env, capture_output=True, text=True)
        if done.returncode == 0:
            return done.stdout
        if "Invalid" in done.stderr or time.monotonic() > end:
            raise SlurmError(done.stderr.strip() or f"scontrol {' '.join(arguments)}: exit code {done.returncode}")
        time.sleep(2)


def _this_job() -> str:
    """Return the number of this job. Members of a job array are named as such, because the job number of one of them is
    that of the array, and would mean all members."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]


def termination() -> Literal["requeued", "preempted", "cancelled"] | None:
    """Return how this job is being ended, by Slurm or a user; None while it runs.

    `preempted`: for good, unless somebody requeues it. A user's scancel after Slurm has begun to preempt the job cannot
    be told from Slurm's.
    """
    shown = _fields()
    if shown["JobState"] == "RUNNING":
        return None
    if int(shown["Restarts"]) > int(os.environ.get("SLURM_RESTART_COUNT", "0")):
        return "requeued"
    return "cancelled" if shown.get("PreemptTime", "None") == "None" else "preempted"


def _fields() -> dict[str, str]:
    """Return what Slurm shows of this job, by name."""
    return dict(re.findall(r"(?:^| )(\w+)=(\S*)", scontrol("show", "job", "--oneliner", _this_job())))
