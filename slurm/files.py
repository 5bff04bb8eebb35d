"""Small files that readers see as they were or as they are."""

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Replace the file at once."""
    partial = path.with_name(f".{path.name}.{os.uname().nodename}-{os.getpid()}")
    partial.write_text(text)
    partial.replace(path)
