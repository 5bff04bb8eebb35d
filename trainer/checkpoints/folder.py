"""Checkpoints: one folder per position, torch.distributed.checkpoint inside, complete or absent.

A checkpoint is written to `<position>.incomplete` and renamed when every rank is done; its manifest has a checksum of
each file. It loads with any engine on any number of ranks, or without a process group. Nothing in it can make loading
execute code.
"""

import gc
import json
import os
import re
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from data.sets.form import ImageForm
from trainer.checkpoints.files import Damaged, Sums, Writer, check_file, check_size, damaged, written
from trainer.checkpoints.reader import Reader
from trainer.errors import RunError, first_line

CHECKPOINTS, SNAPSHOTS = "checkpoints", "snapshots"  # in the run folder
INCOMPLETE, DAMAGED = ".incomplete", ".damaged"
MANIFEST = "manifest.json"
T = TypeVar("T")


def save(
    folder: Path,
    position: int,
    state: dict[str, dict],
    config: str,
    images: ImageForm,
    metrics: dict[str, float] | None = None,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Write the checkpoint of `position` (images seen); all ranks of `group` call it. Raise RunError on all of them,
    and leave nothing, if one cannot write. An existing checkpoint stays: repeated steps would make the same one.

    `config` is the resolved config's text, `images` the form of the training images; `metrics` (name -> value) set the
    checkpoint apart from others.
    """
    final = folder / f"{position:012d}"
    partial = folder / (final.name + INCOMPLETE)
    rank = dist.get_rank()
    try:
        if any(_everywhere(group, lambda: rank == 0 and _begin(partial, final))):
            return
        writer = Writer(partial)
        with _without_collections():
            dcp_save(state, storage_writer=writer, process_group=group)
        parts = _everywhere(group, lambda: writer.sums)

        def finish() -> None:
            files = {name: sums for part in parts for name, sums in part.items()}
            _write(partial / "config.yaml", config, files)
            fields = {"position": position, "world_size": dist.get_world_size(), "data": images.identity}
            fields |= {"images": images.as_record(), "metrics": metrics or {}, "files": dict(sorted(files.items()))}
            _write(partial / MANIFEST, _manifest_text(fields), {})
            _sync(partial)
            partial.rename(final)
            _sync(folder)

        _everywhere(group, lambda: rank or finish())
    except (RunError, CheckpointException) as error:
        if isinstance(error, CheckpointException):
            error = _causes(error)[0]
        # all ranks agree before anything is removed
        free = _everywhere(group, lambda: shutil.disk_usage(folder).free >> 20 if folder.is_dir() else 0)[0]
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)  # if possible: it takes space, and no run can resume from it
        raise RunError(f"{final}: cannot be written: {first_line(error)} ({free} MB free); make room there") from error


def _causes(error: CheckpointException) -> list[BaseException]:
    """Return the ranks' errors, by rank."""
    return [cause for _, (cause, _) in sorted(error.failures.items())]


@contextmanager
def _without_collections() -> Iterator[None]:
    """Pause garbage collection: DCP's plans, many small objects, would set it off again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _begin(partial: Path, final: Path) -> bool:
    """Make the folder to write to anew; return whether there is nothing to do."""
    if partial.exists():
        shutil.rmtree(partial)  # left by a killed run
    if not final.exists():
        partial.mkdir(parents=True)
    return final.exists()


def _everywhere(group: dist.ProcessGroup | None, function: Callable[[], T]) -> list[T]:
    """Return what `function` returns on all ranks. Raise RunError on all of them if a rank has an OSError."""
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


def _manifest_text(fields: dict) -> str:
    return json.dumps({**fields, "crc32": zlib.crc32(json.dumps(fields).encode())}, indent=1)


def find(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return a folder's complete checkpoints, oldest first, and the incomplete ones that a killed run left."""
    complete = [path for path in sorted(folder.glob("*")) if re.fullmatch(r"\d{12}", path.name)]
    return complete, sorted(folder.glob("*" + INCOMPLETE))


def verify(checkpoint: Path) -> None:
    """Raise Damaged if a file of the checkpoint is missing or not as it was written."""
    for name, (size, checksum) in read_manifest(checkpoint)["files"].items():
        check_file(checkpoint / name, size, checksum)


def check_index(checkpoint: Path) -> None:
    """Raise Damaged if the index of what the tensor files hold is not as it was written."""
    for name, (size, checksum) in read_manifest(checkpoint)["files"].items():
        if not name.endswith(DEFAULT_SUFFIX):
            check_file(checkpoint / name, size, checksum)


def check_sizes(checkpoint: Path, part: int = 0, parts: int = 1) -> None:
    """Raise Damaged if a file is missing or has another length. Check only share `part` of `parts`: there may be a
    thousand files, and as many ranks."""
    for name, (size, _) in list(read_manifest(checkpoint)["files"].items())[part::parts]:
        check_size(checkpoint / name, size)


def load(checkpoint: Path, state: dict[str, dict]) -> int:
    """Fill the tensors of `state` in place and return the position, verifying all files on the way. Raise Damaged,
    possibly after filling tensors, if a file is not as it was written. Raise RunError if a tensor is missing or has
    another shape, or what is stored is not a tensor."""
    check_index(checkpoint)
    manifest = read_manifest(checkpoint)
    reader = Reader(checkpoint, manifest["files"])
    _check_shapes(checkpoint, _sizes(reader), state)
    try:
        with warnings.catch_warnings(), _without_collections():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
            dcp_load(state, storage_reader=reader)
    except CheckpointException as error:
        causes = _causes(error)
        cause = next((one for one in causes if isinstance(one, Damaged)), causes[0])
        if isinstance(cause, Damaged):
            raise cause from None
        if isinstance(cause, OSError):
            raise  # from the file system, which may work when the run is restarted
        says = first_line(cause).partition(". ")[0]
        raise RunError(f"{checkpoint}: cannot be read: {says}; use another checkpoint") from error
    return manifest["position"]


def read_manifest(checkpoint: Path) -> dict:
    """Return position, world_size (ranks that wrote it), data (which images), images (their form; older versions did
    not write it), metrics, files (name -> [bytes, CRC-32]). Raise Damaged if it is missing or not as it was written."""
    file = checkpoint / MANIFEST
    if not file.is_file():
        raise Damaged(f"{file}: no such file; {checkpoint} is no checkpoint of ours: remove it")
    try:
        text = file.read_text()
        fields = json.loads(text)
        fields.pop("crc32")
    except (ValueError, KeyError, AttributeError, TypeError):
        text, fields = None, {}
    if text != _manifest_text(fields):
        raise damaged(file, "not as it was written")
    return fields


def stored_sizes(checkpoint: Path) -> dict[str, torch.Size]:
    """Return the shape of each tensor of a checkpoint by name: model.*, ema.*, optimizer.*."""
    return _sizes(Reader(checkpoint))


def _sizes(reader: Reader) -> dict[str, torch.Size]:
    stored = reader.read_metadata().state_dict_metadata
    return {key: value.size for key, value in stored.items() if isinstance(value, TensorStorageMetadata)}


def _check_shapes(checkpoint: Path, sizes: dict[str, torch.Size], state: dict[str, dict]) -> None:
    for part in (part for part in state if part != "optimizer"):
        for name, tensor in state[part].items():
            found = sizes.get(f"{part}.{name}")
            if found != tensor.shape:
                found = "nothing" if found is None else tuple(found)
                raise RunError(
                    f"{checkpoint}: {part}.{name} is {found}, the network's is {tuple(tensor.shape)}: a checkpoint of"
                    " another model; use the model config beside it"
                )


def _write(path: Path, text: str, sums: Sums) -> None:
    with written(path, sums) as stream:
        stream.write(text.encode())


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
