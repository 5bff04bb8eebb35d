"""Samples of a checkpoint: samples.npz, samples.png, and samples.json, which says how they were made."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from data.sets.registry import Images
from data.stores.files import sha256
from trainer.build import build_network, open_data
from trainer.checkpoints import folder as checkpoint
from trainer.checkpoints.weights import find_checkpoint, find_weights, read_weights, start_from
from trainer.config.tree import Config
from trainer.errors import RunError
from trainer.ranks import Ranks, local_device
from trainer.run_folder import read_config
from trainer.sampling.decode import make_decoder
from trainer.sampling.generate import Networks, classes_shown, generate, grid, to_uint8


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


def fixed(config: Config) -> Config:
    """With the checkpoints that sample.weaker and sample.small mean now: a run that goes on has others later."""
    named = {name: getattr(config.sample, name) for name in ("weaker", "small")}
    found = {name: str(find_weights(path).absolute()) for name, path in named.items() if path}
    return config.model_copy(update={"sample": config.sample.model_copy(update=found)})


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


def load_networks(
    folder: Path | None,
    config: Config,
    images: Images,
    device: torch.device,
    raw: bool = False,
    file: Path | None = None,
) -> Networks:
    """The network of a checkpoint with its EMA weights, its `raw` ones, or those of a `file`, and those that
    sample.weaker and sample.small name, with their EMA weights."""
    network = build_network(config, images)
    if file:
        start_from(network, read_weights(file, raw), str(file))
    else:
        checkpoint.load(folder, {"model" if raw else "ema": network.state_dict()})  # fills the network's own tensors
    others = [_load_other(name, config, images) for name in ("weaker", "small")]
    return Networks(*(net and net.to(device).eval() for net in (network, *others)))


def _load_other(name: str, config: Config, images: Images) -> nn.Module | None:
    """The network that sample.NAME means: of a run or checkpoint, as its config says; of a file, as this one says."""
    source = getattr(config.sample, name)
    if source is None:
        return None
    own = read_config(find_checkpoint(Path(source))) if Path(source).is_dir() else config
    about = ("name", "learns_variance", "noise_scale")
    if any(getattr(own.path, field) != getattr(config.path, field) for field in about):
        raise RunError(f"sample.{name}={source}: was trained on another path ({own.path.name}); give one on the run's")
    if own.model.max_group_size < config.model.max_group_size:
        raise RunError(
            f"sample.{name}={source}: has model.max_group_size={own.model.max_group_size}, the run"
            f" {config.model.max_group_size}; give one with as many or more"
        )
    network = build_network(own, images)
    start_from(network, read_weights(source), str(source))
    return network


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
