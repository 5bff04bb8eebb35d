"""Small files that readers see as they were or as they are, and logs that grow."""

import os
from pathlib import Path
from typing import TextIO


def write_whole(path: Path, text: str) -> None:
    """Replace the file at once."""
    partial = path.with_name(f".{path.name}.{os.uname().nodename}-{os.getpid()}")
    partial.write_text(text)
    partial.replace(path)


def show_new(log: Path, shown: int, out: TextIO) -> int:
    """Copy what a log, which need not exist yet, has beyond its first `shown` bytes; how many have been shown then."""
    if not log.exists():
        return shown
    with log.open("rb") as file:
        file.seek(shown)
        text = file.read()
    out.write(text.decode(errors="replace"))
    out.flush()
    return shown + len(text)
