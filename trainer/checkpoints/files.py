"""The files of a checkpoint: each is written, or read, and checksummed in a single pass.

Threads write, bypassing the page cache where the file system can: that keeps no core busy, and leaves the cache to what
training reads. Reading goes through the cache, in long pieces, because file systems read ahead better than we do.
"""

import errno
import io
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from fcntl import F_GETFL, F_SETFL, fcntl
from mmap import PAGESIZE, mmap
from pathlib import Path

import torch
from isal.isal_zlib import crc32  # several times as fast as zlib's
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter

from trainer.errors import RunError

PIECE = 1 << 24  # bytes written at once: a disk shared by ranks is fastest with long pieces
AHEAD = 3  # pieces: one is checksummed while the others are written
Sums = dict[str, list[int]]  # name -> [bytes, CRC-32]


class Damaged(RunError):
    """A checkpoint is not as it was written. The message names the file."""


def damaged(file: Path, wrong: str) -> Damaged:
    """Return the error about a file of a checkpoint."""
    mend = f"remove {file.parent}, or set resume.fallback=true, to continue from the one before it"
    return Damaged(f"{file}: {wrong}; it is damaged: {mend}")


# writing


class _Stream:
    """A stream that copies into a buffer, checksums there, and has the threads of `disk` write the file."""

    def __init__(self, handle: int, disk: ThreadPoolExecutor) -> None:
        self.size, self.checksum, self._start = 0, 0, 0
        self._handle, self._disk = handle, disk
        self._buffers = deque(mmap(-1, PIECE) for _ in range(AHEAD))
        self._writes: deque[Future] = deque()

    def write(self, content: bytes | memoryview) -> int:
        left = memoryview(content).cast("B")
        while len(left):
            filled = self.size % PIECE
            now = left[: PIECE - filled]
            self._buffers[0][filled : filled + len(now)] = now
            self.size += len(now)
            left = left[len(now) :]
            if self.size % PIECE == 0:
                self._hand_over(memoryview(self._buffers[0]))
                self._buffers.rotate(-1)
                if len(self._writes) == AHEAD:
                    self._writes.popleft().result()  # the write from the next buffer
        return memoryview(content).nbytes

    def finish(self) -> None:
        """Write what is left. What does not fill a page has to go through the cache."""
        left = memoryview(self._buffers[0])[: self.size % PIECE]
        pages = len(left) // PAGESIZE * PAGESIZE
        self._hand_over(left[:pages])
        self._wait()
        fcntl(self._handle, F_SETFL, fcntl(self._handle, F_GETFL) & ~os.O_DIRECT)
        self._hand_over(left[pages:])
        self._wait()

    def _hand_over(self, content: memoryview) -> None:
        self.checksum = crc32(content, self.checksum)
        self._writes.append(self._disk.submit(_write, self._handle, content, self._start))
        self._start += len(content)

    def _wait(self) -> None:
        while self._writes:
            self._writes.popleft().result()

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        pass  # DCP does it after each tensor

    def close(self) -> None:
        pass  # DCP does it before the file is synced


def _write(handle: int, content: memoryview, start: int) -> None:
    while len(content):
        count = os.pwrite(handle, content, start)
        content, start = content[count:], start + count


@contextmanager
def written(path: Path, sums: Sums) -> Iterator[_Stream]:
    """Open a stream to a new file; when this closes, the file is on disk and listed in `sums`."""
    handle = _create(path)
    try:
        with ThreadPoolExecutor(AHEAD - 1) as disk:
            stream = _Stream(handle, disk)
            yield stream
            stream.finish()
        os.fsync(handle)
    finally:
        os.close(handle)
    sums[path.name] = [stream.size, stream.checksum]


def _create(path: Path) -> int:
    """Create a file, to be written past the page cache if the file system can."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        return os.open(path, flags | os.O_DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o666)


class _Files(FileSystem):
    """DCP's file system, with our streams."""

    def __init__(self) -> None:
        self.sums: Sums = {}

    def create_stream(self, path: Path, mode: str) -> AbstractContextManager[_Stream]:
        return written(path, self.sums)

    def rename(self, path: Path, new_path: Path) -> None:
        super().rename(path, new_path)
        self.sums[new_path.name] = self.sums.pop(path.name)


class Writer(FileSystemWriter):
    """DCP's writer. When it is done, its files are on disk, and those that this rank wrote are listed in `sums`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, sync_files=False)  # our streams do
        torch.serialization.set_crc32_options(False)  # none for each tensor: the file has one
        self.fs = _Files()
        self.sums = self.fs.sums


# reading


def check_size(file: Path, size: int) -> None:
    """Raise Damaged unless the file exists and has `size` bytes."""
    found = file.stat().st_size if file.is_file() else "no file"
    if found != size:
        raise damaged(file, f"{found}, should be {size} bytes")


def check_file(file: Path, size: int, checksum: int) -> None:
    """Raise Damaged unless a file is as it was written."""
    check_size(file, size)
    with file.open("rb", buffering=0) as stream:
        source = Source(stream, summed=True)
        source.pass_to(size)
    check_sum(file, source.checksum, checksum)


def check_sum(file: Path, found: int, checksum: int) -> None:
    """Raise Damaged unless the CRC-32 found is the manifest's."""
    if found != checksum:
        raise damaged(file, "its checksum is not that of the manifest")


class Source:
    """A file read once, from its start; if it is `summed`, it is read whole, and `checksum` is its CRC-32."""

    def __init__(self, stream: io.FileIO, summed: bool) -> None:
        self.position, self.checksum = 0, 0
        self._stream, self._summed = stream, summed
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)  # so that more of it is read ahead

    def read_into(self, room: memoryview) -> None:
        """Fill `room`. Raise EOFError if the file ends first."""
        while len(room):
            count = self._stream.readinto(room)
            if not count:
                raise EOFError(f"ends at byte {self.position}")
            if self._summed:
                self.checksum = crc32(room[:count], self.checksum)
            self.position += count
            room = room[count:]

    def pass_to(self, position: int) -> None:
        """Skip to `position`. Raise ValueError if it was read already."""
        if position < self.position:
            raise ValueError(f"byte {position} was read already")
        if not self._summed:
            self.position = self._stream.seek(position)
        while self.position < position:
            self.read_into(memoryview(bytearray(min(PIECE, position - self.position))))
