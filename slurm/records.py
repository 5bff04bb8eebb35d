"""What each task of an attempt leaves behind: RANK.json in a folder."""

import json
import shutil
from pathlib import Path
from typing import Any

from slurm.files import write_whole

_FOLDER = "records"


def clear_records(logs: Path) -> None:
    """Before an attempt."""
    shutil.rmtree(logs / _FOLDER, ignore_errors=True)
    (logs / _FOLDER).mkdir(parents=True)


def write_record(logs: Path, rank: int, **entries: Any) -> None:
    """`outcome` (running, finished, stopped, failed), `host`; if it failed `error`, `final` (starting
    again would not help), `step`, and ranks that were `absent`."""
    write_whole(logs / _FOLDER / f"{rank}.json", json.dumps(entries))


def read_records(logs: Path) -> dict[int, dict]:
    """By rank, with `at`, when they were written: by one clock, that of the file server."""
    paths = (logs / _FOLDER).glob("*.json")
    return {int(path.stem): json.loads(path.read_text()) | {"at": path.stat().st_mtime_ns} for path in paths}
