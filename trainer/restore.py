"""Continuing a run from its newest checkpoint."""

from pathlib import Path

import torch.distributed as dist

from data.images import Images
from data.streamed_latents import StreamedLatents
from trainer import checkpoint
from trainer.checkpoint import DAMAGED
from trainer.engines import Engine
from trainer.errors import RunError
from trainer.ranks import from_rank_0


def choose(folder: Path, images: Images, fallback: bool) -> tuple[Path | None, list[str]]:
    """The newest complete checkpoint (None: there is none) of a run's folder, and what there is to say.

    RunError if it is damaged, unless `fallback` allows the one before it, or of other images. All ranks call it: each
    reads a part of the files.
    """
    notes = from_rank_0(lambda: _remove_incomplete(folder))
    while newest := from_rank_0(lambda: next(reversed(checkpoint.find(folder)[0]), None)):
        damage = _damage(newest)
        if damage is None:
            notes += from_rank_0(lambda: _differences(newest, images))
            return newest, [*notes, f"continuing from {newest}"]
        if not fallback or from_rank_0(lambda: len(checkpoint.find(folder)[0])) == 1:  # never from the very start
            raise RunError(damage)
        aside = from_rank_0(lambda: _set_aside(newest))
        notes.append(f"{damage.partition(';')[0]}; it is {aside.name} now")
    return None, notes


def restore(newest: Path, engine: Engine, batch: int) -> int:
    """Load a checkpoint into the engine; its position. RunError if it is of another model. All ranks call it."""
    state = engine.state()
    position = checkpoint.load(newest, state)
    engine.load_state(state, position // batch)
    return position


def _set_aside(damaged: Path) -> Path:
    aside = damaged.with_suffix(DAMAGED)
    number = 1
    while aside.exists():  # of another time at this position
        number += 1
        aside = damaged.with_suffix(f"{DAMAGED}-{number}")
    return damaged.rename(aside)


def _remove_incomplete(folder: Path) -> list[str]:
    _, incomplete = checkpoint.find(folder)
    for path in incomplete:
        checkpoint.remove(path)
    return [f"{path}: incomplete, left by a killed run; removed" for path in incomplete]


def _damage(newest: Path) -> str | None:
    """What is wrong with its files; the same on all ranks."""
    try:
        checkpoint.verify(newest)
        mine = None
    except RunError as error:
        mine = str(error)
    found: list = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return next((damage for damage in found if damage), None)


def _differences(newest: Path, images: Images) -> list[str]:
    manifest, ranks = checkpoint.read_manifest(newest), dist.get_world_size()
    before = manifest["data"]
    if before != images.identity:
        raise RunError(
            f"{newest}: was trained on other images ({before}) than data has now ({images.identity}); give the run"
            " those, or set run= to a new folder"
        )
    if isinstance(images, StreamedLatents) and manifest["world_size"] != ranks:
        return [
            f"{ranks} ranks instead of {manifest['world_size']}: data.streaming deals the shards anew, so images of"
            " this epoch may come twice or not at all"
        ]
    return []
