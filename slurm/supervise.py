"""What runs in a job's batch script: it starts the tasks, and starts them again when the program is not to blame.

The program is to blame, and the run ends, if the exception says that it is final or if a failure comes twice in the
same step. Otherwise the tasks start again in the same allocation, up to `retries` times in a row; a host that failed
twice is left out, for which the job is requeued. Near the time limit and on preemption the tasks save and stop, and the
job is requeued.
"""

import os
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from slurm.queue import SlurmError, host_names, requeue, seconds_left, termination
from slurm.records import clear_records, read_records
from slurm.signals import note_signals
from slurm.state import Attempt, RunState, find_state, read_state, write_state
from slurm.tasks import run_by_srun, run_here
from slurm.verdict import conclude, decide

STOP = "stop-requested"  # a file in the run folder: its user wants it to end
LOST = "a node was lost, or the job was preempted or requeued"
LAST_MOMENT = 20.0  # seconds before the time limit when tasks that have not saved are given up


class RunFailed(Exception):
    """The run cannot continue; the message is one line."""


@dataclass(frozen=True)
class Job:
    """What a supervisor needs to know."""

    run: Path  # the run folder
    logs: Path  # the folder of this submission's logs, with task.pkl
    code: Path  # the snapshot that the tasks import
    lock: Path  # a file that tasks of a lost start of this job may still hold
    retries: int  # starts after failures in a row
    on_slurm: bool
    exclude: str = ""  # hosts that the user leaves out
    tasks: int = 1  # of a local job
    visible_gpus: str | None = None  # of a local job: CUDA_VISIBLE_DEVICES
    cpus_per_task: int | None = None
    gpus_per_node: int = 0  # of a job on Slurm
    seconds_to_stop: float = 0.0  # before the time limit, when it is too late to start again


def supervise(job: Job) -> str:
    """Run the job's tasks until the run is "finished", "stopped" or "requeued", which is returned. Raise RunFailed if
    it cannot continue."""
    try:
        return _supervise(job)
    except SlurmError as error:
        state = read_state(job.run)
        state.state, state.why = "failed", f"Slurm did not answer: {error}"
        write_state(job.run, state)
        raise RunFailed(state.why) from error


def _supervise(job: Job) -> str:
    signals = note_signals()
    state = find_state(job.run) or RunState()
    if state.ended:
        return state.state  # requeued from outside when all was done
    if state.attempts and state.attempts[-1].outcome == "running":
        state.attempts[-1].outcome, state.attempts[-1].why = "lost", LOST
        if os.environ.get("SLURM_RESTART_COUNT", "0") != "0":
            job.lock.unlink(missing_ok=True)  # Slurm guarantees that nothing of the job's previous start is running
    if (job.run / STOP).exists():
        write_state(job.run, state.model_copy(update={"state": "stopped", "why": "as asked"}))
        return "stopped"
    while True:
        attempt = Attempt(hosts=host_names() if job.on_slurm else [socket.gethostname()], began=time.time())
        state.state, state.why, state.attempts = "running", "", [*state.attempts, attempt]
        write_state(job.run, state)
        _attempt(job, attempt, signals)
        end = termination() if job.on_slurm and attempt.outcome != "finished" else None
        if end in ("requeued", "preempted") and attempt.outcome == "failed":
            attempt.outcome, attempt.why, attempt.host = "lost", LOST, ""
        if attempt.host:
            state.host_failures[attempt.host] = state.host_failures.get(attempt.host, 0) + 1
        stop_asked = (job.run / STOP).exists() or (end == "cancelled" if job.on_slurm else bool(signals))
        near_limit = job.on_slurm and seconds_left() < job.seconds_to_stop
        verdict, state.why = decide(state, job.retries, near_limit, stop_asked, can_requeue=job.on_slurm)
        if verdict == "restart":
            state.state = "running"
        else:
            state.state = "queued" if verdict == "requeue" else verdict
        write_state(job.run, state)
        if verdict == "requeue":
            requeue(",".join([*filter(None, [job.exclude]), *state.excluded]))
            return "requeued"
        if verdict == "failed":
            raise RunFailed(state.why)
        if verdict != "restart":
            return verdict


def _attempt(job: Job, attempt: Attempt, signals: list[int]) -> None:
    """Run the tasks once and fill in how they ended."""
    clear_records(job.logs)
    if job.on_slurm:

        def deadline() -> float:
            return time.time() + seconds_left() - LAST_MOMENT

        heard = 0

        def watch() -> None:
            """Requeue at once if the job is preempted for good: all of it is killed soon, this supervisor too, and it
            has to be in the queue by then."""
            nonlocal heard
            if len(signals) > heard:
                heard = len(signals)
                with suppress(SlurmError):  # it is asked again when the tasks have ended
                    if termination() == "preempted":
                        requeue("")

        bad_ends = run_by_srun(job.logs, job.code, job.cpus_per_task, job.gpus_per_node, deadline, watch)
    else:
        bad_ends = run_here(job.logs, job.code, job.tasks, job.visible_gpus, lambda: bool(signals))
    conclude(attempt, read_records(job.logs), bad_ends, job.logs)
    attempt.ended = time.time()
