"""Resume a run from its newest checkpoint."""

from functools import partial
from pathlib import Path

import torch.distributed as dist

from data.sets.images import Images
from trainer.checkpoints import folder as checkpoint
from trainer.checkpoints.files import Damaged
from trainer.checkpoints.folder import DAMAGED
from trainer.checkpoints.retention import remove
from trainer.engines.base import Engine
from trainer.errors import RunError
from trainer.ranks import from_rank_0


def restore(folder: Path, engine: Engine, images: Images, batch: int, fallback: bool) -> tuple[int, list[str]]:
    """Load the newest complete checkpoint of a run's folder into the engine. Return its position (0: there is none),
    and notes for the user. All ranks call it.

    Raise RunError if it is of another model or of other images, or if it is damaged and `fallback` does not allow the
    one before it.
    """
    notes, state = from_rank_0(lambda: _remove_incomplete(folder)), {}
    while newest := from_rank_0(lambda: next(reversed(checkpoint.find(folder)[0]), None)):
        try:
            _all_find_whole(newest)
            differences = from_rank_0(partial(_differences, newest, images))
            state = state or engine.state()
            position = checkpoint.load(newest, state)
        except Damaged as damage:
            if not fallback or from_rank_0(lambda: len(checkpoint.find(folder)[0])) == 1:  # never from the very start
                raise
            aside = from_rank_0(partial(_set_aside, newest))
            notes.append(f"{str(damage).partition(';')[0]}; it is {aside.name} now")
        else:
            engine.load_state(state, position // batch)
            return position, [*notes, *differences, f"continuing from {newest}"]
    return 0, notes


def _set_aside(damaged: Path) -> Path:
    aside = damaged.with_suffix(DAMAGED)
    number = 1
    while aside.exists():  # set aside earlier at this position
        number += 1
        aside = damaged.with_suffix(f"{DAMAGED}-{number}")
    return damaged.rename(aside)


def _remove_incomplete(folder: Path) -> list[str]:
    _, incomplete = checkpoint.find(folder)
    for path in incomplete:
        remove(path)
    return [f"{path}: incomplete, left by a killed run; removed" for path in incomplete]


def _all_find_whole(newest: Path) -> None:
    """Raise Damaged on all ranks if one of them finds the index damaged, or a file in its share missing."""
    try:
        checkpoint.check_index(newest)
        checkpoint.check_sizes(newest, dist.get_rank(), dist.get_world_size())
        mine = None
    except Damaged as damage:
        mine = str(damage)
    found: list = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    for damage in filter(None, found):
        raise Damaged(damage)


def _differences(newest: Path, images: Images) -> list[str]:
    manifest, ranks = checkpoint.read_manifest(newest), dist.get_world_size()
    before = manifest["data"]
    if before != images.identity:
        raise RunError(
            f"{newest}: was trained on other images ({before}) than data has now ({images.identity}); give the run"
            " those, or set run= to a new folder"
        )
    note = images.resume_note(manifest["world_size"], ranks)
    return [note] if note else []
