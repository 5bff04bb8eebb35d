"""Samples of a checkpoint: samples.npz, samples.png, and samples.json, which says how they were made."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data.stores.files import sha256
from trainer.build import open_data
from trainer.checkpoints import folder as checkpoint
from trainer.config.tree import Config
from trainer.ranks import Ranks, local_device
from trainer.sampling.decode import make_decoder
from trainer.sampling.generate import generate
from trainer.sampling.networks import load_networks
from trainer.sampling.pictures import classes_shown, grid, to_uint8


def make_samples(
    folder: Path | None,
    config: Config,
    raw: bool = False,
    file: Path | None = None,
    progress: Callable[[int], object] = lambda number: None,
) -> tuple[np.ndarray, np.ndarray, dict]:
    """(images (classes, per_class, H, W, C) uint8, labels (classes, per_class), record of how they were made), by the
    EMA weights of a checkpoint, its `raw` ones, or those of a `file` (then no checkpoint is needed), in this process.
    """
    images = open_data(config)
    device = local_device()
    decode = make_decoder(images.vae, images.shape[0], device)
    networks = load_networks(folder, config, images, device, raw, file)
    with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        made, evaluations = generate(networks, config, images, Ranks(0, 1, device), progress)
    label = np.repeat(np.arange(len(made))[:, None], made.shape[1], axis=1)
    record = describe(folder, config, raw, file) | {"evaluations": evaluations}
    return to_uint8(decode(made)), label, record


def describe(folder: Path | None, config: Config, raw: bool, file: Path | None) -> dict:
    """How samples are made: what two results must share to be compared."""
    position = checkpoint.read_manifest(folder)["position"] if folder else None
    weights = str(file) if file else "model" if raw else "ema"
    about = {
        "checkpoint": folder and str(folder),
        "position": position,
        "weights": weights,
        "weights_sha256": file and sha256(file),
        "precision": config.precision,
    }
    return about | {"path": config.path.name, "group_layers": config.model.group_layers} | config.sample.model_dump()


def write_samples(out: Path, pixels: np.ndarray, label: np.ndarray, record: dict, group_size: int) -> None:
    """samples.npz (arr_0 (N, H, W, C) uint8, as ADM's evaluator takes, arr_1 labels), samples.png (of many classes
    some), and samples.json."""
    out.mkdir(parents=True, exist_ok=True)
    flat = pixels.reshape(-1, *pixels.shape[2:])
    (out / "samples.json").unlink(missing_ok=True)  # never beside samples that it does not describe
    partial = out / "samples.partial.npz"
    np.savez(partial, arr_0=flat, arr_1=label.ravel())
    partial.replace(out / "samples.npz")
    picture = grid(pixels[list(classes_shown(len(pixels), pixels.shape[2]))], group_size)
    Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture).save(out / "samples.png")
    partial = out / "samples.partial.json"
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.replace(out / "samples.json")  # last: all is there
