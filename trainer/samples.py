"""Samples of a checkpoint: samples.npz, samples.png, and samples.json, which says how they were made."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from trainer import checkpoint
from trainer.build import build_network, open_data
from trainer.config import Config
from trainer.decode import make_decoder
from trainer.generate import generate, grid, to_uint8
from trainer.ranks import Ranks
from trainer.weights import read_weights, start_from

GRID_COLUMNS = 16


def make_samples(
    folder: Path,
    config: Config,
    raw: bool = False,
    file: Path | None = None,
    progress: Callable[[int], object] = lambda number: None,
) -> tuple[np.ndarray, np.ndarray, dict]:
    """(images (classes, per_class, H, W, C) uint8, labels (classes, per_class), record of how they were made) from the
    EMA weights of a checkpoint, its `raw` ones, or those of a `file`, in this one process."""
    weights = str(file) if file else "model" if raw else "ema"
    images = open_data(config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    decode = make_decoder(images.vae, images.shape[0], device)
    network = build_network(config, images)
    checkpoint.verify(folder)
    if file:
        start_from(network, read_weights(file, raw), weights)
    else:
        checkpoint.load(folder, {weights: network.state_dict()})  # fills the network's own tensors
    position = checkpoint.read_manifest(folder)["position"]
    with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        made = generate(network.to(device).eval(), config, images, Ranks(0, 1, device), progress)
    label = np.repeat(np.arange(len(made))[:, None], made.shape[1], axis=1)
    made = decode(made)
    record = {"checkpoint": str(folder), "position": position, "weights": weights, "precision": config.precision}
    record |= config.sample.model_dump()
    return to_uint8(made), label, record


def write_samples(out: Path, pixels: np.ndarray, label: np.ndarray, record: dict, group_size: int) -> None:
    """samples.npz (arr_0 (N, H, W, C) uint8, as ADM's evaluator takes, arr_1 labels), samples.json, and samples.png."""
    out.mkdir(parents=True, exist_ok=True)
    flat = pixels.reshape(-1, *pixels.shape[2:])
    (out / "samples.json").unlink(missing_ok=True)  # never beside samples that it does not describe
    partial = out / "samples.partial.npz"
    np.savez(partial, arr_0=flat, arr_1=label.ravel())
    partial.replace(out / "samples.npz")
    (out / "samples.json").write_text(json.dumps(record, indent=1) + "\n")
    picture = grid(pixels[:, :GRID_COLUMNS], group_size, enlarge=max(1, 32 // pixels.shape[2]))
    Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture).save(out / "samples.png")
