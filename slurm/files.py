"""Files and folders that appear whole, and logs that grow."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` for a file or folder to be written; at the end it takes `path`'s place at once, so
    that readers see the old one or the new one. A folder can only take the place of an empty one, or of none."""
    partial = path.with_name(f".{path.name}.{os.uname().nodename}-{os.getpid()}")
    yield partial
    partial.replace(path)


def write_text(path: Path, text: str) -> None:
    """Replace the content of a file at once."""
    with replacing(path) as partial:
        partial.write_text(text)


def show_new(log: Path, shown: int, out: TextIO) -> int:
    """Copy to `out` what a log holds beyond its first `shown` bytes; return how many bytes have been shown then.

    The log need not exist yet.
    """
    if not log.exists():
        return shown
    with log.open("rb") as file:
        file.seek(shown)
        text = file.read()
    out.write(text.decode(errors="replace"))
    out.flush()
    return shown + len(text)
