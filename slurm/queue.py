"""What Slurm's queue says and does about this job."""

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
    """A command of Slurm failed; the message is what it said."""


def requeue(excluded: str) -> None:
    """Have this job start again, without the hosts `excluded`."""
    job = _this_job()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # also in scontrol: a job that is requeued is terminated meanwhile
    if leaving() in (None, "preempted"):
        scontrol("requeue", job)
    if excluded:
        scontrol("update", f"JobId={job}", f"ExcNodeList={excluded}")


def seconds_left() -> float:
    """Until the time limit."""
    end = _fields()["EndTime"]
    return float("inf") if end == "Unknown" else datetime.fromisoformat(end).timestamp() - time.time()


def queue_state(job: str) -> str:
    """A job's state in the queue, as PENDING or RUNNING; "" if it is not there. LaunchError if Slurm does not say."""
    try:
        done = subprocess.run(["squeue", "--noheader", f"--jobs={job}", "--format=%T"], capture_output=True, text=True)
    except FileNotFoundError:
        raise LaunchError(f"squeue: not found, to ask for job {job}; do this on a Slurm login node") from None
    if done.returncode and "Invalid job id" not in done.stderr:
        raise LaunchError(f"squeue: {done.stderr.strip()}")
    return done.stdout.strip().partition("\n")[0]


def host_names() -> list[str]:
    """Of this job's nodes, in Slurm's order."""
    return scontrol("show", "hostnames", os.environ["SLURM_JOB_NODELIST"]).split()


def scontrol(*arguments: str) -> str:
    """What scontrol prints. It is asked again while slurmctld, which may be busy or away, does not answer."""
    end, env = time.monotonic() + PATIENCE, os.environ | {"SLURM_TIME_FORMAT": "standard"}
    while True:
        done = subprocess.run(["scontrol", *arguments], env=env, capture_output=True, text=True)
        if done.returncode == 0:
            return done.stdout
        if "Invalid" in done.stderr or time.monotonic() > end:
            raise SlurmError(done.stderr.strip() or f"scontrol {' '.join(arguments)}: exit code {done.returncode}")
        time.sleep(2)


def _this_job() -> str:
    """Its number. One member of a job array has the number of the array as its own, which would mean all members."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]


def leaving() -> Literal["requeued", "preempted", "cancelled"] | None:
    """Whether this job, of which we are a part, is at its end by Slurm's will (`preempted`: for good, unless somebody
    requeues it) or a user's. Who uses scancel when Slurm has begun to preempt is not told from Slurm."""
    shown = _fields()
    if shown["JobState"] == "RUNNING":
        return None
    if int(shown["Restarts"]) > int(os.environ.get("SLURM_RESTART_COUNT", "0")):
        return "requeued"
    return "cancelled" if shown.get("PreemptTime", "None") == "None" else "preempted"


def _fields() -> dict[str, str]:
    """What Slurm says of this job."""
    return dict(re.findall(r"(?:^| )(\w+)=(\S*)", scontrol("show", "job", "--oneliner", _this_job())))
