"""RUN/state.json: how a run is doing and what befell it, in one small file that its supervisor alone writes."""

import time
from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from slurm.files import write_whole

STATE = "state.json"


class Attempt(BaseModel):
    """One start of all tasks. `lost`: its supervisor went with it (a node lost, or requeued from outside)."""

    hosts: list[str]
    began: float  # seconds since 1970
    ended: float | None = None
    outcome: Literal["running", "finished", "stopped", "failed", "lost"] = "running"
    why: str = ""
    step: int | None = None  # that it failed in
    host: str = ""  # where it failed
    final: bool = False  # starting again would not help


class RunState(BaseModel):
    """`queued` and `running` go on by themselves; `finished`, `stopped` and `failed` are the end."""

    state: Literal["queued", "running", "finished", "stopped", "failed"] = "queued"
    why: str = ""
    logs: str = ""
    attempts: list[Attempt] = []
    host_failures: dict[str, int] = {}
    excluded: list[str] = []  # hosts that the next starts do without

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen by itself."""
        return self.state in ("finished", "stopped", "failed")


def read_state(run: Path) -> RunState | None:
    """None where no run was submitted to that folder."""
    path = run / STATE
    return RunState.model_validate_json(path.read_text()) if path.is_file() else None


def write_state(run: Path, state: RunState) -> None:
    """Whole or not at all."""
    write_whole(run / STATE, state.model_dump_json(indent=1) + "\n")


def restore_state(run: Path, state: RunState | None) -> None:
    """As `read_state` gave it."""
    if state:
        write_state(run, state)
    else:
        (run / STATE).unlink(missing_ok=True)


def describe(run: Path, state: RunState) -> str:
    """What a user wants to see of a run."""
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
