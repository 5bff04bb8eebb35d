"""Checkpoints: one folder per position, torch.distributed.checkpoint inside, complete or not there.

A checkpoint is written to `<position>.incomplete` and renamed when every rank is done; its manifest has a checksum of
each file. It loads with any engine on any number of ranks, or without a process group. Nothing in it can make loading
execute code.
"""

import json
import os
import pickle
import re
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import is_dataclass
from pathlib import Path
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from pydantic import BaseModel, Field
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from trainer.errors import RunError, first_line

CHECKPOINTS, SNAPSHOTS = "checkpoints", "snapshots"  # in the run folder
INCOMPLETE, DAMAGED = ".incomplete", ".damaged"
MANIFEST = "manifest.json"
CHUNK = 1 << 22  # bytes
T = TypeVar("T")
_METADATA = "torch.distributed.checkpoint.metadata"
_INDEX_CLASSES = {
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
    ("torch", "Size"),
    ("torch", "bfloat16"),
    ("torch", "float32"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    (_METADATA, "ChunkStorageMetadata"),
    (_METADATA, "Metadata"),
    (_METADATA, "MetadataIndex"),
    (_METADATA, "StorageMeta"),
    (_METADATA, "TensorProperties"),
    (_METADATA, "TensorStorageMetadata"),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
}


class CheckpointConfig(BaseModel, extra="forbid", frozen=True):
    """When checkpoints are written (besides at the end) and which stay."""

    every: int = Field(1_280_000, ge=1)  # images
    keep: int = Field(3, ge=1)  # the newest ones
    keep_every: int = Field(0, ge=0)  # also, for good, the first one after each multiple of so many images; 0: none
    keep_best: Literal["loss"] | None = None  # also the one with the lowest mean loss since the one before
    snapshot_every: int = Field(0, ge=0)  # images between two snapshots of optim.power_ema, which all stay; 0: none
    asynchronous: bool = True  # written while training goes on, from a copy in host memory


class ResumeConfig(BaseModel, extra="forbid", frozen=True):
    """How a run continues."""

    fallback: bool = False  # from the checkpoint before, where the newest is damaged; else that is an error


def save(
    folder: Path,
    position: int,
    state: dict[str, dict],
    config: str,
    data: str,
    metrics: dict[str, float] | None = None,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Write the checkpoint of `position` (images seen); all ranks of the `group` call it. RunError on all of them, and
    nothing is left, if one cannot write. One that is there stays: a run that does its steps again makes it again.

    `config` is the resolved config's text, `data` tells the images from others, `metrics` (name -> value) the
    checkpoint from others.
    """
    final = folder / f"{position:012d}"
    partial = folder / (final.name + INCOMPLETE)
    rank = dist.get_rank()
    try:
        if any(_everywhere(group, lambda: rank == 0 and _begin(partial, final))):
            return
        writer = dcp.FileSystemWriter(partial, sync_files=False)  # below, while they are read again
        torch.serialization.set_crc32_options(False)  # of each tensor; our manifest has those of the files
        dcp.save(state, storage_writer=writer, process_group=group)
        parts = _everywhere(group, lambda: _sync_and_sum(partial.glob(f"__{rank}_*")))

        def finish() -> None:
            _write_synced(partial / "config.yaml", config)
            files = _sync_and_sum([partial / "config.yaml", partial / ".metadata"])
            for part in parts:
                files |= part
            fields = {"position": position, "world_size": dist.get_world_size(), "data": data}
            fields |= {"metrics": metrics or {}, "files": dict(sorted(files.items()))}
            _write_synced(partial / MANIFEST, _manifest_text(fields))
            _sync(partial)
            partial.rename(final)
            _sync(folder)

        _everywhere(group, lambda: rank or finish())
    except (RunError, CheckpointException) as error:
        if isinstance(error, CheckpointException):
            error = _cause(error)
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)  # what can be: it takes room, and is nothing to go on from
        free = shutil.disk_usage(folder).free >> 20 if folder.is_dir() else 0
        raise RunError(f"{final}: cannot be written: {first_line(error)} ({free} MB free); make room there") from error


def _cause(error: CheckpointException) -> BaseException:
    return next(cause for cause, _ in error.failures.values())


def _begin(partial: Path, final: Path) -> bool:
    """Make the folder to write to, anew; whether there is nothing to do."""
    if partial.exists():
        shutil.rmtree(partial)  # of a killed run
    if not final.exists():
        partial.mkdir(parents=True)
    return final.exists()


def _everywhere(group: dist.ProcessGroup | None, function: Callable[[], T]) -> list[T]:
    """What all ranks return, or on all of them a RunError, if a rank has an OSError."""
    try:
        mine = (function(), None)
    except OSError as error:
        mine = (None, str(error))
    found: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, mine, group=group)
    for _, error in found:
        if error is not None:
            raise RunError(error)
    return [result for result, _ in found]


def _sync_and_sum(files: Iterable[Path]) -> dict[str, list[int]]:
    """{name: [bytes, CRC-32]}; the disk writes the files while they are read from the cache."""
    found = {}
    with ThreadPoolExecutor(1) as disk:
        for file in files:
            written = disk.submit(_sync, file)
            found[file.name] = [file.stat().st_size, _checksum(file)]
            written.result()
    return found


def _checksum(file: Path) -> int:
    total, buffer = 0, bytearray(CHUNK)
    with file.open("rb", buffering=0) as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)  # the disk reads on while we sum
        while size := stream.readinto(buffer):
            total = zlib.crc32(memoryview(buffer)[:size], total)
    return total


def _manifest_text(fields: dict) -> str:
    return json.dumps({**fields, "crc32": zlib.crc32(json.dumps(fields).encode())}, indent=1)


def find(folder: Path) -> tuple[list[Path], list[Path]]:
    """(complete checkpoints, oldest first; incomplete ones that a killed run left) in a run's checkpoint folder."""
    complete = [path for path in sorted(folder.glob("*")) if re.fullmatch(r"\d{12}", path.name)]
    return complete, sorted(folder.glob("*" + INCOMPLETE))


def verify(checkpoint: Path, part: int = 0, parts: int = 1) -> None:
    """RunError if a file of the checkpoint is missing or not as it was written. Reads every `parts`-th file, from the
    `part`-th on, so that ranks can share the work."""
    for name, (size, checksum) in list(read_manifest(checkpoint)["files"].items())[part::parts]:
        file = checkpoint / name
        found = file.stat().st_size if file.is_file() else "no file"
        if found != size:
            raise RunError(f"{file}: {found}, should be {size} bytes; {_damaged(checkpoint)}")
        if _checksum(file) != checksum:
            raise RunError(f"{file}: its checksum is not that of the manifest; {_damaged(checkpoint)}")


def _damaged(checkpoint: Path) -> str:
    return f"it is damaged: remove {checkpoint}, or set resume.fallback=true, to continue from the one before it"


def load(checkpoint: Path, state: dict[str, dict]) -> int:
    """Fill the tensors of `state` in place and return the position. RunError if one is missing or of another shape, or
    what is stored is no tensor."""
    _check_shapes(checkpoint, state)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
            dcp.load(state, storage_reader=Reader(checkpoint))
    except CheckpointException as error:
        cause = _cause(error)
        if isinstance(cause, OSError):
            raise  # of the file system, which may work when the run is started again
        says = first_line(cause).partition(". ")[0]
        raise RunError(f"{checkpoint}: cannot be read: {says}; use another checkpoint") from error
    return read_manifest(checkpoint)["position"]


def read_manifest(checkpoint: Path) -> dict:
    """position, world_size (ranks that wrote it), data (which images), metrics, files (name -> [bytes, CRC-32]).
    RunError if there is none, or it is damaged."""
    file = checkpoint / MANIFEST
    if not file.is_file():
        raise RunError(f"{file}: no such file; {checkpoint} is no checkpoint of ours: remove it")
    try:
        text = file.read_text()
        fields = json.loads(text)
        fields.pop("crc32")
    except (ValueError, KeyError, AttributeError, TypeError):
        text, fields = None, {}
    if text != _manifest_text(fields):
        raise RunError(f"{file}: not as it was written; {_damaged(checkpoint)}")
    return fields


class Reader(dcp.FileSystemReader):
    """DCP's reader, whose pickled index may name nothing but the classes that an index consists of."""

    def read_metadata(self, *args: object, **kwargs: object) -> Metadata:
        """The index. RunError if it is none, or names anything else: unpickling that would execute code."""
        path = Path(self.path) / ".metadata"
        with path.open("rb") as file:
            try:
                metadata = _IndexUnpickler(file).load()
                metadata.storage_meta.load_id = self.load_id
            except OSError:
                raise
            except Exception as error:  # at foreign bytes an unpickler raises whatever it likes
                says = error if isinstance(error, RunError) else f"no index of a checkpoint ({first_line(error)})"
                raise RunError(f"{path}: {says}; use another checkpoint") from None
        return metadata


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in _INDEX_CLASSES:
            raise RunError(f"refused, for {module}.{name} in it would execute code")
        found = super().find_class(module, name)
        if not callable(found):
            return found

        def make(_: type, *arguments: object) -> object:
            return found.__new__(found, *arguments) if is_dataclass(found) else found(*arguments)

        # what makes such objects, not the class itself: a pickle can also set attributes of a class that it gets
        return type(name, (), {"__new__": make})


def stored_sizes(checkpoint: Path) -> dict[str, torch.Size]:
    """The shape of each tensor of a checkpoint, by its name: model.*, ema.*, optimizer.*."""
    stored = Reader(checkpoint).read_metadata().state_dict_metadata
    return {key: value.size for key, value in stored.items() if isinstance(value, TensorStorageMetadata)}


def _check_shapes(checkpoint: Path, state: dict[str, dict]) -> None:
    sizes = stored_sizes(checkpoint)
    for part in (part for part in state if part != "optimizer"):
        for name, tensor in state[part].items():
            found = sizes.get(f"{part}.{name}")
            if found != tensor.shape:
                found = "nothing" if found is None else tuple(found)
                raise RunError(
                    f"{checkpoint}: {part}.{name} is {found}, the network's is {tuple(tensor.shape)}: a checkpoint of"
                    " another model; use the model config beside it"
                )


def prune(folder: Path, config: CheckpointConfig) -> None:
    """Remove all but the newest `keep` and those that `keep_every` and `keep_best` keep. One rank calls it.

    One that is not whole does not count, and stays for people to look at: the last good one is never removed.
    """
    whole = [checkpoint for checkpoint in find(folder)[0] if _is_whole(checkpoint)]
    kept = set(whole[-config.keep :])
    if config.keep_every:
        for_good: dict[int, Path] = {}
        for checkpoint in whole:
            for_good.setdefault(int(checkpoint.name) // config.keep_every, checkpoint)
        for_good.pop(0, None)
        kept.update(for_good.values())
    if config.keep_best:
        measured = {checkpoint: read_manifest(checkpoint)["metrics"] for checkpoint in whole}
        known = [checkpoint for checkpoint in whole if config.keep_best in measured[checkpoint]]
        kept.update(sorted(known, key=lambda checkpoint: measured[checkpoint][config.keep_best])[:1])
    for checkpoint in whole:
        if checkpoint not in kept:
            remove(checkpoint)


def _is_whole(checkpoint: Path) -> bool:
    """Whether all files are there, at their length: a look that costs nothing."""
    try:
        files = read_manifest(checkpoint)["files"]
    except RunError:
        return False
    found = {file.name: file.stat().st_size for file in checkpoint.iterdir()}
    return all(found.get(name) == size for name, (size, _) in files.items())


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint; killed half-way, it is one of the incomplete ones. So is, till later, what cannot be deleted
    now: on NFS, a file that somebody reads."""
    shutil.rmtree(checkpoint.rename(checkpoint.with_suffix(INCOMPLETE)), ignore_errors=True)


def _write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
