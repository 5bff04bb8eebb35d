"""Reconstruct an average of any length from the snapshots of a run."""

from pathlib import Path

import numpy as np

from trainer.checkpoints import folder as checkpoint
from trainer.checkpoints.weights import check_out, read_part, write_weights
from trainer.engines.ema import POWER, power_name
from trainer.engines.power_ema import coefficients, combine
from trainer.errors import RunError
from trainer.run_folder import read_config


def reconstruct(run: Path, std: float, out: Path, position: int | None = None) -> int:
    """Write a run's average of relative `std` at `position` (images seen; None: the last snapshot) as a .safetensors
    file. Return how many snapshot averages it combines. Raise RunError if there are none, or they miss it."""
    check_out(out)
    config = read_config(run)
    folders, _ = checkpoint.find(run / checkpoint.SNAPSHOTS)
    if not folders:
        raise RunError(
            f"{run}: no snapshots in it; train with optim.power_ema=[0.05,0.1] checkpoint.snapshot_every=..."
        )
    batch = config.train.global_batch
    position = int(folders[-1].name) if position is None else position
    kept = [(folder, one) for folder in folders for one in config.optim.power_ema]
    factors = coefficients([(one, int(folder.name) // batch) for folder, one in kept], std, position // batch)
    used = [(folder, one, factor) for (folder, one), factor in zip(kept, factors, strict=True) if factor]
    parts = (read_part(folder, power_name(one)) for folder, one, _ in used)
    weights = combine(parts, np.array([factor for _, _, factor in used]))
    write_weights(weights, out, used[-1][0], f"{POWER}{std} at {position}")
    return len(used)
