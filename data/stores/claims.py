"""Share the parts of a piece of work among processes on any number of nodes; one that dies releases what it held.

A claim is a POSIX lock on a file, which the system releases when its process ends, for whatever reason. A file system
without locks gives a warning: let one process at a time work there.
"""

import fcntl
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from data.errors import DataError
from data.stores.files import WORK


class Claims:
    """Iterate to claim parts: numbers of `results` (files in `folder`) that do not exist and that no other process is
    making.

    Iteration starts at part `start` and ends when nothing is left to claim, or when the file `complete` appears, which
    is made from the results. Call `release` once the result exists.
    """

    def __init__(self, folder: Path, results: list[str], start: int = 0, complete: Path | None = None) -> None:
        self.folder, self.results, self.start, self.complete = folder, results, start, complete
        self._held: dict[int, TextIO] = {}

    def __iter__(self) -> Iterator[int]:
        claimed = True
        while claimed:  # look again: another process may have died meanwhile
            claimed = False
            for i in range(len(self.results)):
                part = (self.start + i) % len(self.results)
                if part not in self._held and not self._done(part) and self._claim(part):
                    claimed = True
                    yield part

    def release(self, part: int) -> None:
        """Release a part."""
        self._held.pop(part).close()

    def _done(self, part: int) -> bool:
        return (self.folder / self.results[part]).exists() or (self.complete is not None and self.complete.exists())

    def _claim(self, part: int) -> bool:
        name = self.results[part]
        lock = _open_lock(self.folder, name)
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # EAGAIN or EACCES: another process has it
            lock.close()
            return False
        except OSError as error:
            _warn(self.folder, error)
        else:
            with suppress(FileNotFoundError):  # another process cleaned up
                for left in (self.folder / WORK).glob(f"{name}.*"):
                    if left.suffix != ".lock":
                        left.unlink()  # left by a process that was killed
        if self._done(part):  # finished between the check and the lock
            lock.close()
            return False
        self._held[part] = lock
        return True


@contextmanager
def wait_for_lock(folder: Path, name: str) -> Iterator[None]:
    """Let one process at a time into the block."""
    with _open_lock(folder, name) as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX)
        except OSError as error:
            _warn(folder, error)
        yield


def _open_lock(folder: Path, name: str) -> TextIO:
    while True:
        try:
            (folder / WORK).mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            if error.filename != str(folder / WORK):
                raise DataError(f"{error.filename}: a link to nothing; give another folder") from None
            # it existed, and a moment later did not: another process finished and cleaned up
        with suppress(FileNotFoundError):  # likewise
            return (folder / WORK / f"{name}.lock").open("w")


def _warn(folder: Path, error: OSError) -> None:
    warnings.warn(f"{folder}: has no file locks ({error}); let one process at a time work on it", stacklevel=3)
