"""What each task of an attempt leaves behind for its supervisor: LOGS/records/RANK.json.

The contract with the function that a task calls: an exception that leaves it may carry these attributes, which are read
with getattr, so that neither side imports the other (`trainer.errors.add_facts` sets them).

- `final`, True: the user has to fix it; another start would fail the same way.
- `step`, int: the step in which it was raised.
- `absent_ranks`, list[int]: ranks that did not answer this one.
- `at_fault`: see `AtFault`; left out, the program.
"""

import json
import shutil
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from slurm.files import write_text

_FOLDER = "records"

AtFault = Literal["program", "peer", "node", "port"]
"""Where the cause of a failure lies: in the program or its input; in another rank, whose end broke a connection; in the
machine, so that another one may do; or in a port that somebody else had taken, so that any other start may do."""


@dataclass(frozen=True)
class Record:
    """How one task is doing, or how it ended."""

    outcome: Literal["running", "finished", "stopped", "failed"]
    host: str  # as Slurm calls it
    error: str = ""  # one line; the rest describes it
    final: bool = False
    step: int | None = None
    absent_ranks: list[int] = field(default_factory=list)
    at_fault: AtFault = "program"
    written_at: int = 0  # nanoseconds since 1970 by the clock of the file server, the same for all; set by reading


def failed_record(host: str, error: BaseException) -> Record:
    """Return the record of a task that `error` ended."""
    final = getattr(error, "final", False) is True
    message = next(iter(str(error).strip().splitlines()), "")
    return Record(
        outcome="failed",
        host=host,
        error=message if final else f"{type(error).__name__}: {message}",
        final=final,
        step=getattr(error, "step", None),
        absent_ranks=getattr(error, "absent_ranks", []),
        at_fault=getattr(error, "at_fault", "program"),
    )


def clear_records(logs: Path) -> None:
    """Remove the records of the attempt before."""
    shutil.rmtree(logs / _FOLDER, ignore_errors=True)
    (logs / _FOLDER).mkdir(parents=True)


def write_record(logs: Path, rank: int, record: Record) -> None:
    """Write the record of a task, in place of the one before."""
    entries = asdict(record)
    del entries["written_at"]
    write_text(logs / _FOLDER / f"{rank}.json", json.dumps(entries))


def read_records(logs: Path) -> dict[int, Record]:
    """Return the records by rank. Fields of other versions are left out, and those that are missing have defaults."""
    return {int(path.stem): _read(path) for path in (logs / _FOLDER).glob("*.json")}


def _read(path: Path) -> Record:
    entries: dict[str, Any] = json.loads(path.read_text()) | {"written_at": path.stat().st_mtime_ns}
    known = {field.name for field in fields(Record)}
    return Record(**{name: value for name, value in entries.items() if name in known})
