"""Compute latents, features and pixels of an image set: the work of each process of tools/precompute_*.py."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.extraction.crop import center_crop
from data.extraction.extract import Work, extract
from data.neighbors.graph import build_graph
from models.pretrained.encoders import Encoder
from models.pretrained.fingerprint import fingerprint
from models.pretrained.vae import VAE
from trainer.errors import NOT_LOADED, RunError, first_line
from trainer.ranks import local_device

PIXELS_AT_ONCE = 32  # images that a worker prepares at once
T = TypeVar("T")
Precision = Literal["bf16", "fp32"]


def precompute_latents(
    images: Path,
    out: Path,
    vae: str,
    image_size: int,
    precision: Precision,
    dtype: Literal["float16", "float32"],
    part_size: int,
    batch: int,
    workers: int,
    max_rejects: int,
    process: int = 0,
    processes: int = 1,
) -> dict | None:
    """Store the posterior moments of every image and of its mirror image, (2, 2C, h, w): mean and log-variance along
    the second axis, not scaled. Return the manifest, or None if other processes are still making shards."""
    network = _load("--vae", vae, lambda: VAE(vae, local_device(), precision))
    if image_size % network.factor:
        raise RunError(f"--size {image_size}: must be a multiple of the VAE's factor, {network.factor}")
    work = latents_work(network, images, out, image_size, dtype, part_size, batch, workers, max_rejects)
    return extract(work, process, processes)


def latents_work(
    vae: VAE,
    images: Path,
    out: Path,
    image_size: int,
    dtype: Literal["float16", "float32"],
    part_size: int,
    batch: int,
    workers: int,
    max_rejects: int,
) -> Work:
    """Return the work of encoding images with this VAE."""
    settings = {
        "name": vae.name,
        "vae_weights": fingerprint(vae.network),
        "scaling_factor": vae.scaling,
        "shift_factor": vae.shift,
        "size": image_size,
        "transform": "ADM centre crop",
        "precision": vae.precision,
        "dtype": dtype,
    }

    def encode(pixels: Tensor) -> dict[str, np.ndarray]:
        x = pixels.to(vae.device, non_blocking=True) / 127.5 - 1
        moments = vae.moments(torch.cat([x, x.flip(3)]))
        both = moments.unflatten(0, (2, len(x))).transpose(0, 1)
        return {"moments": both.to(getattr(torch, dtype)).cpu().numpy()}

    return Work("latents", images, out, settings, _cropped(image_size), encode, part_size, batch, workers, max_rejects)


def precompute_features(
    images: Path,
    out: Path,
    encoder: str,
    precision: Precision,
    part_size: int,
    batch: int,
    workers: int,
    max_rejects: int,
    process: int = 0,
    processes: int = 1,
) -> dict | None:
    """Store a float16 unit vector per image. Return the manifest, or None if other processes still make shards."""
    network = _load("--encoder", encoder, lambda: Encoder(encoder, local_device(), precision))
    settings = {
        "name": encoder,
        "encoder_weights": fingerprint(network.network),
        "transform": network.transform,
        "precision": precision,
    }

    def encode(inputs: Tensor) -> dict[str, np.ndarray]:
        features = network.features(inputs.to(network.device, non_blocking=True))
        return {"feature": features.half().cpu().numpy()}

    work = Work("features", images, out, settings, network.prepare, encode, part_size, batch, workers, max_rejects)
    return extract(work, process, processes)


def _cropped(size: int) -> Callable[[Image.Image], np.ndarray]:
    """Return the preparation of an image as a centre crop, uint8 (3, size, size)."""
    return lambda image: center_crop(image, size).transpose(2, 0, 1)


def _load(option: str, name: str, load: Callable[[], T]) -> T:
    try:
        return load()
    except NOT_LOADED as error:
        raise RunError(
            f"{option} {name}: cannot be loaded: {first_line(error)}; give a local folder or a hub name"
        ) from None


def build_neighbors(precision: Precision | None, **arguments: Any) -> None:
    """Call data.neighbors.graph.build_graph on this process's device; `precision` None: the one that is fast there."""
    device = local_device()
    precision = precision or ("bf16" if device.type == "cuda" else "fp32")
    build_graph(precision=precision, device=device, **arguments)


def precompute_pixels(
    images: Path,
    out: Path,
    image_size: int,
    part_size: int,
    workers: int,
    max_rejects: int,
    process: int = 0,
    processes: int = 1,
) -> dict | None:
    """Store uint8 (3, size, size) of every image; its mirror image has the same numbers in another order, and is not
    stored. Return the manifest, or None if other processes are still making shards."""
    settings = {"size": image_size, "transform": "ADM centre crop"}

    def encode(pixels: Tensor) -> dict[str, np.ndarray]:
        return {"pixels": pixels.numpy()}

    work = Work(
        "pixels", images, out, settings, _cropped(image_size), encode, part_size, PIXELS_AT_ONCE, workers, max_rejects
    )
    return extract(work, process, processes)
