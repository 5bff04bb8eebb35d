"""RUN/state.json: how a run is doing and what happened to it, in one small file that its supervisor alone writes."""

import time
from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from slurm.files import write_text
from slurm.records import AtFault

STATE = "state.json"


class Attempt(BaseModel):
    """One start of all tasks."""

    hosts: list[str]
    began: float  # seconds since 1970
    ended: float | None = None
    outcome: Literal["running", "finished", "stopped", "failed", "lost"] = "running"
    """`lost`: its supervisor was lost with it (a node failed, or the job was requeued from outside)."""
    why: str = ""  # one line
    step: int | None = None  # in which it failed
    host: str = ""  # where it failed; empty if no host is to blame
    final: bool = False  # the user has to fix it; another start would fail the same way
    at_fault: AtFault = "program"


class RunState(BaseModel):
    """How a run is doing: `queued` and `running` need nobody; `finished`, `stopped` and `failed` are ends."""

    state: Literal["queued", "running", "finished", "stopped", "failed"] = "queued"
    why: str = ""  # one line
    logs: str = ""  # the folder with the logs of the newest submission
    attempts: list[Attempt] = []  # of the newest submission
    host_failures: dict[str, int] = {}  # how many failures began on a host
    excluded: list[str] = []  # hosts that the next starts leave out

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen by itself."""
        return self.state in ("finished", "stopped", "failed")


def find_state(run: Path) -> RunState | None:
    """Return the state of a run, or None where no run was submitted to that folder."""
    return read_state(run) if (run / STATE).is_file() else None


def read_state(run: Path) -> RunState:
    """Return the state of a run that was submitted."""
    return RunState.model_validate_json((run / STATE).read_text())


def write_state(run: Path, state: RunState) -> None:
    """Replace the state of a run."""
    write_text(run / STATE, state.model_dump_json(indent=1) + "\n")


def restore_state(run: Path, state: RunState | None) -> None:
    """Put back what `find_state` returned."""
    if state:
        write_state(run, state)
    else:
        (run / STATE).unlink(missing_ok=True)


def describe(run: Path, state: RunState) -> str:
    """Return what a user wants to see of a run: a line, and one for each attempt."""
    lines = [f"{run}: {state.state}" + f": {state.why}" * bool(state.why)]
    for number, attempt in enumerate(state.attempts, start=1):
        seconds = (attempt.ended or time.time()) - attempt.began
        began = time.strftime("%m-%d %H:%M:%S", time.localtime(attempt.began))
        line = f"  {number}. {began}  {seconds:6.0f} s  {attempt.outcome:8}  {','.join(attempt.hosts)}"
        lines.append(line + f"  {attempt.why}" * bool(attempt.why))
    if state.host_failures:
        lines.append("  failures: " + ", ".join(f"{host} {n}" for host, n in sorted(state.host_failures.items())))
    if state.excluded:
        lines.append("  excluded: " + ", ".join(state.excluded))
    return "\n".join(lines)
