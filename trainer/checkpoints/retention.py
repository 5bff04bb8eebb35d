"""Which checkpoints of a run are kept, and how the others are removed."""

import shutil
import warnings
from pathlib import Path

from trainer.checkpoints.config import CheckpointConfig
from trainer.checkpoints.folder import INCOMPLETE, find, read_manifest
from trainer.errors import RunError


def prune(folder: Path, config: CheckpointConfig) -> None:
    """Remove all checkpoints but the newest `keep` and those that `keep_every` and `keep_best` keep. One rank calls it.

    A checkpoint that is not whole does not count, and stays for inspection: the last good one is never removed.
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
    """Return whether all files exist with the right lengths: a check that costs next to nothing."""
    try:
        files = read_manifest(checkpoint)["files"]
        found = {file.name: file.stat().st_size for file in checkpoint.iterdir()}
    except (RunError, OSError):  # it may be unreadable, or have vanished
        return False
    return all(found.get(name) == size for name, (size, _) in files.items())


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint; if this is killed half-way, it is left as an incomplete one. So, for now, is one that cannot
    be deleted yet: on NFS, a file that somebody is reading. One that cannot even be renamed stays, with a warning."""
    try:
        shutil.rmtree(checkpoint.rename(checkpoint.with_suffix(INCOMPLETE)), ignore_errors=True)
    except OSError as error:
        warnings.warn(f"{checkpoint}: cannot be removed: {error.strerror}", stacklevel=2)
