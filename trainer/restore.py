"""Continuing a run from its newest checkpoint."""

from pathlib import Path

import torch.distributed as dist

from data.images import Images
from data.streamed_latents import StreamedLatents
from trainer import checkpoint
from trainer.engines import Engine
from trainer.errors import RunError
from trainer.ranks import from_rank_0


def restore(folder: Path, engine: Engine, images: Images) -> tuple[int, list[str]]:
    """Load the newest complete checkpoint into the engine. Returns its position (0: none) and what there is to say.

    RunError if it is damaged, or of other images or another model. All ranks call it.
    """

    def choose() -> tuple[Path | None, list[str]]:
        complete, incomplete = checkpoint.find(folder)
        for path in incomplete:
            checkpoint.remove(path)
        notes = [f"{path}: incomplete, left by a killed run; removed" for path in incomplete]
        if not complete:
            return None, notes
        checkpoint.verify(complete[-1])
        notes += _differences(complete[-1], images)
        return complete[-1], [*notes, f"continuing from {complete[-1]}"]

    newest, notes = from_rank_0(choose)
    if newest is None:
        return 0, notes
    state = engine.state()
    position = checkpoint.load(newest, state)
    engine.load_state(state)
    return position, notes


def _differences(newest: Path, images: Images) -> list[str]:
    manifest, ranks = checkpoint.read_manifest(newest), dist.get_world_size()
    before = manifest.get("data", images.identity)
    if before != images.identity:
        raise RunError(
            f"{newest}: was trained on other images ({before}) than data has now ({images.identity}); give the run"
            " those, or set run= to a new folder"
        )
    if isinstance(images, StreamedLatents) and manifest.get("world_size", ranks) != ranks:
        return [
            f"{ranks} ranks instead of {manifest['world_size']}: data.streaming deals the shards anew, so images of"
            " this epoch may come twice or not at all"
        ]
    return []
