"""Samples of a network: samples.npz, samples.png, and samples.json, which says how they were made."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from data.stores.files import appearing, sha256, write_json
from trainer.checkpoints.weights import WeightSource
from trainer.config.tree import Config
from trainer.errors import RunError
from trainer.ranks import Ranks
from trainer.sampling.decode import make_decoder
from trainer.sampling.finite import not_finite
from trainer.sampling.generate import generate
from trainer.sampling.labels import check_per_class
from trainer.sampling.networks import load
from trainer.sampling.pictures import classes_shown, grid, to_uint8

RECORDED_LATER = {
    "labels": "balanced",
    "slots": "fixed",
}  # how older versions made samples, whose records do not say it


def make_samples(
    source: WeightSource, config: Config, progress: Callable[[int], object] = lambda number: None
) -> tuple[np.ndarray, np.ndarray, dict]:
    """Return (images (classes, per_class, H, W, C) uint8, labels (classes, per_class), record of how they were made),
    generated in this process. Raise RunError if one is not finite."""
    check_per_class(config.sample)
    loaded = load(source, config)
    decode = make_decoder(loaded.images.vae, loaded.images.shape[0], loaded.device)
    with loaded.inference():
        made = generate(loaded.networks, config, loaded.images, Ranks(0, 1, loaded.device), progress)
    decoded = made._replace(images=decode(made.images))
    if wrong := not_finite(decoded, config.sample, source.weights):
        raise RunError(wrong)
    label = np.repeat(np.arange(len(made.images))[:, None], made.images.shape[1], axis=1)
    return to_uint8(decoded.images), label, describe(source, config) | {"evaluations": made.evaluations}


def describe(source: WeightSource, config: Config) -> dict:
    """Return how samples are made: what two results must share to be comparable."""
    about = {
        "checkpoint": source.checkpoint and str(source.checkpoint),
        "position": source.position,
        "weights": source.weights,
        "weights_sha256": source.file and sha256(source.file),
        "precision": config.precision,
    }
    return about | {"path": config.path.name, "group_layers": config.model.group_layers} | config.sample.model_dump()


def write_samples(out: Path, pixels: np.ndarray, label: np.ndarray, record: dict, group_size: int) -> None:
    """Write samples.npz (arr_0 (N, H, W, C) uint8, as for ADM's evaluator, arr_1 labels), samples.png (only some of the
    classes if there are many), and samples.json."""
    out.mkdir(parents=True, exist_ok=True)
    flat = pixels.reshape(-1, *pixels.shape[2:])
    (out / "samples.json").unlink(missing_ok=True)  # never keep it beside samples that it does not describe
    with appearing(out / "samples.npz") as file:
        np.savez(file, arr_0=flat, arr_1=label.ravel())
    picture = grid(pixels[list(classes_shown(len(pixels), pixels.shape[2]))], group_size)
    Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture).save(out / "samples.png")
    write_json(out / "samples.json", record)  # last: it says that everything is there
