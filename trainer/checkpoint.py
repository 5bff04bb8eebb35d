"""Checkpoints: one folder per position, torch.distributed.checkpoint inside, complete or not there.

A checkpoint is written to `<position>.incomplete` and renamed when every rank is done. It loads with any engine on any
number of ranks, or without a process group.
"""

import json
import os
import re
import shutil
import warnings
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from pydantic import BaseModel, Field
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from trainer.errors import RunError

INCOMPLETE = ".incomplete"
MANIFEST = "manifest.json"


class CheckpointConfig(BaseModel, extra="forbid", frozen=True):
    """When checkpoints are written (besides at the end) and which stay."""

    every: int = Field(1_280_000, ge=1)  # images
    keep: int = Field(3, ge=1)  # the newest ones
    keep_every: int = Field(0, ge=0)  # also, for good, the first one after each multiple of so many images; 0: none


def save(folder: Path, position: int, state: dict[str, dict], config: str, data: str) -> None:
    """Write the checkpoint of `position` (images seen); all ranks call it. `config` is the resolved config's text,
    `data` tells the images from others."""
    final = folder / f"{position:012d}"
    partial = folder / (final.name + INCOMPLETE)
    if dist.get_rank() == 0:
        partial.mkdir(parents=True)
    dist.barrier()
    dcp.save(state, checkpoint_id=partial)  # returns when every rank's file is on disk
    if dist.get_rank() == 0:
        _write_synced(partial / "config.yaml", config)
        sizes = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
        manifest = {"position": position, "world_size": dist.get_world_size(), "data": data, "files": sizes}
        _write_synced(partial / MANIFEST, json.dumps(manifest, indent=1))
        _sync(partial)
        partial.rename(final)
        _sync(folder)
    dist.barrier()


def find(folder: Path) -> tuple[list[Path], list[Path]]:
    """(complete checkpoints, oldest first; incomplete ones that a killed run left) in a run's checkpoint folder."""
    complete = [path for path in sorted(folder.glob("*")) if re.fullmatch(r"\d{12}", path.name)]
    return complete, sorted(folder.glob("*" + INCOMPLETE))


def verify(checkpoint: Path) -> None:
    """RunError if a file of the checkpoint is missing or was cut off."""
    if not (checkpoint / MANIFEST).is_file():
        raise RunError(f"{checkpoint / MANIFEST}: no such file; {checkpoint} is no checkpoint of ours: remove it")
    manifest = read_manifest(checkpoint)
    for name, size in manifest["files"].items():
        file = checkpoint / name
        found = file.stat().st_size if file.is_file() else "no file"
        if found != size:
            raise RunError(
                f"{file}: {found}, should be {size} bytes; the checkpoint is damaged: remove {checkpoint} to continue"
                " from the one before it"
            )


def load(checkpoint: Path, state: dict[str, dict]) -> int:
    """Fill the tensors of `state` in place and return the position. RunError if one is missing or of another shape."""
    _check_shapes(checkpoint, state)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        dcp.load(state, checkpoint_id=checkpoint)
    return read_manifest(checkpoint)["position"]


def read_manifest(checkpoint: Path) -> dict:
    """position, world_size (ranks that wrote it), data (which images), files and their sizes."""
    return json.loads((checkpoint / MANIFEST).read_text())


def _check_shapes(checkpoint: Path, state: dict[str, dict]) -> None:
    stored = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    sizes = {key: value.size for key, value in stored.items() if isinstance(value, TensorStorageMetadata)}
    for part in ("model", "ema"):
        for name, tensor in state.get(part, {}).items():
            found = sizes.get(f"{part}.{name}")
            if found != tensor.shape:
                found = "nothing" if found is None else tuple(found)
                raise RunError(
                    f"{checkpoint}: {part}.{name} is {found}, the network's is {tuple(tensor.shape)}: a checkpoint of"
                    " another model; use the model config beside it"
                )


def prune(folder: Path, config: CheckpointConfig) -> None:
    """Remove all but the newest `keep` and those that `keep_every` keeps. One rank calls it."""
    complete, _ = find(folder)
    for_good: dict[int, Path] = {}
    if config.keep_every:
        for checkpoint in complete:
            for_good.setdefault(int(checkpoint.name) // config.keep_every, checkpoint)
        for_good.pop(0, None)
    for checkpoint in complete[: -config.keep]:
        if checkpoint not in for_good.values():
            remove(checkpoint)


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint; killed half-way, it is one of the incomplete ones."""
    shutil.rmtree(checkpoint.rename(checkpoint.with_suffix(INCOMPLETE)))


def _write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
