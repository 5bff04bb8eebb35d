"""Write files that exist whole or not at all, even after a power failure."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, BinaryIO

from data.errors import DataError

WORK = ".work"  # holds what is being written, inside the folder where it will appear
TRIES = 100  # to write there, while other processes remove the empty folder


@contextmanager
def appearing(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing. It gets its name if the block succeeds and is removed if the block fails."""
    with appearing_path(path) as partial, partial.open("wb") as file:
        yield file
        sync(file)


@contextmanager
def appearing_path(path: Path, folder: bool = False) -> Iterator[Path]:
    """Make an empty file or folder for a library to write, which gets its name if the block succeeds and is
    removed if the block fails. The caller calls `sync` on what must survive a power failure."""
    partial = partial_of(path)
    _make(partial, folder)
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        _remove(partial)
        raise
    finally:
        with suppress(OSError):  # others write or hold locks there, or have removed it
            partial.parent.rmdir()


def partial_of(path: Path) -> Path:
    """Return the path where this process writes what will become `path`; other processes write elsewhere."""
    return path.parent / WORK / f"{path.name}.{os.uname().nodename}-{os.getpid()}"


def _make(partial: Path, folder: bool) -> None:
    for left in reversed(range(TRIES)):
        try:
            partial.parent.mkdir(parents=True, exist_ok=True)
            _remove(partial)  # of a killed process with the same number
            partial.mkdir() if folder else partial.touch()
            return
        except (FileNotFoundError, FileExistsError):  # removed by a writer that was the last one there
            if not left:
                raise


def _remove(partial: Path) -> None:
    if partial.is_dir():
        shutil.rmtree(partial, ignore_errors=True)
    else:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file of UTF-8 text."""
    with appearing(path) as file:
        file.write(text.encode())


def write_json(path: Path, content: object) -> None:
    """Write a file of indented JSON."""
    write_text(path, json.dumps(content, indent=1) + "\n")


@contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """Raise DataError if the disk of a tool's output is full, or something may not be read or written."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.ENOTDIR):
            raise
        raise DataError(
            f"{error.filename or f'--out {out}'}: {error.strerror}; what is complete stays: fix that and start again"
        ) from None


def sync(file: IO) -> None:
    """Flush what was written to an open file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def sha256(path: Path) -> str:
    """Return the SHA-256 checksum of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
