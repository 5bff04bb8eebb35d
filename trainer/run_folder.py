"""A run is a folder: config.yaml, metrics.jsonl, measures.jsonl, TensorBoard events, checkpoints/, logs/, samples."""

import fcntl
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data.stores.files import write_text
from trainer.config.fields import marked, matches
from trainer.config.parsing import dotted, to_yaml
from trainer.config.tree import STORED, Config, stored_config
from trainer.errors import RunError

CONFIG, LOCK = STORED, "lock"


def check_folder(config: Config) -> Config:
    """Return the config to go on with: as given, but plain runs of 0.1 keep the sample embedding that they have. Raise
    RunError if the run folder holds a run of another config; a folder without a run is fine."""
    if not (Path(config.run) / CONFIG).is_file():
        return config
    begun = read_config(config.run)
    if config.groups.variant == "none" and not config.model.slots:
        model = config.model.model_copy(update={"max_group_size": begun.model.max_group_size})
        config = config.model_copy(update={"model": model})
    free = marked(Config, "may_change", True)
    before, now = dotted(begun.model_dump()), dotted(config.model_dump())
    for name in {**now, **before}:  # a loss term that was removed is only in the old config
        value = now.get(name)
        if value != before.get(name) and not matches(name, free):
            raise RunError(
                f"{name}={value}: the run in {config.run} has {name}={before.get(name)};"
                " set it back, or set run= to a new folder"
            )
    return config


def read_config(folder: str | Path) -> Config:
    """Return the resolved config of a run folder or of a checkpoint."""
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise RunError(f"{folder}: no {CONFIG} in it; give a run folder, as runs/digits")
    try:
        return stored_config(path.read_text())
    except RunError as error:  # written by another version
        raise RunError(f"{path}: {error}") from None


@contextmanager
def sole_user(folder: Path) -> Iterator[None]:
    """Reserve this run for us until we leave or die. Raise RunError if another process is writing it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # per process: loader workers do not inherit it
        except (BlockingIOError, PermissionError):  # EAGAIN or EACCES: somebody holds it
            raise RunError(f"run={folder}: another job is writing this run; wait for its end or cancel it") from None
        except OSError as error:
            warnings.warn(f"{folder}: cannot be locked ({error}); let one job at a time write it", stacklevel=2)
        yield


def write_config(config: Config) -> None:
    """Create the run folder and write the resolved config to it, whole or not at all. One rank calls it."""
    write_text(Path(config.run) / CONFIG, to_yaml(config))
