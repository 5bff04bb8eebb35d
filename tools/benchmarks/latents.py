"""What the preprocessing costs besides the VAE: its images/s over those of bare `vae.encode`, and over extraction one
image at a time into one file per image."""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from benchmarks import Figures, Targets
from benchmarks.pictures import write_pictures
from data.extraction.crop import center_crop, decode_rgb
from data.extraction.extract import extract
from models.pretrained.vae import VAE
from trainer.precompute import latents_work

ROUNDS, SIZE = 3, 256


def measure() -> tuple[Figures, Targets]:
    """The SD-VAE's shape (83.7 M weights, random), photographs, fp32 on a CPU, bf16 on a GPU. The three take turns."""
    gpu = torch.cuda.is_available()
    number, batch = (8192, 64) if gpu else (8, 4)
    seconds: dict[str, list[float]] = {"ours": [], "bare": [], "single": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        vae = _sd_vae(folder / "vae", "bf16" if gpu else "fp32")
        write_pictures(folder / "images", number)
        files = sorted((folder / "images").rglob("*.jpg"))
        for i in range(ROUNDS):
            out = folder / f"out{i}"
            work = latents_work(
                vae,
                folder / "images",
                out,
                SIZE,
                "float16",
                part_size=number,
                batch=batch,
                workers=2 * (1 + 3 * gpu),
                max_rejects=0,
            )
            for kind, run in (
                ("bare", lambda: _bare(vae, number, batch)),
                ("ours", lambda work=work: extract(work)),
                ("single", lambda: _one_by_one(vae, files[: max(number // 16, 4)], folder / "single")),
            ):
                start = time.perf_counter()
                run()
                seconds[kind].append(time.perf_counter() - start)
    ours, bare, single = (number / statistics.median(seconds[kind]) for kind in ("ours", "bare", "single"))
    single *= max(number // 16, 4) / number
    figures: Figures = {
        "images_per_second": ours,
        "bare_images_per_second": bare,
        "one_by_one_images_per_second": single,
        "over_bare": statistics.median(b / o for b, o in zip(seconds["bare"], seconds["ours"], strict=True)),
        "over_one_by_one": ours / single,
    }
    return figures, {"over_bare": (">=", 0.9)}


def _sd_vae(folder: Path, precision: Literal["bf16", "fp32"]) -> VAE:
    shape: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
    }
    AutoencoderKL(**shape).save_pretrained(folder)
    vae = VAE(str(folder), torch.device("cuda" if torch.cuda.is_available() else "cpu"), precision)
    vae.moments(torch.zeros(2, 3, SIZE, SIZE, device=vae.device))
    return vae


def _bare(vae: VAE, number: int, batch: int) -> None:
    """`vae.encode` and nothing else, on as many images and mirror images, of the same batch."""
    both = torch.rand(2 * batch, 3, SIZE, SIZE, device=vae.device)
    for _ in range(number // batch):
        vae.moments(both)
    if vae.device.type == "cuda":
        torch.cuda.synchronize()


def _one_by_one(vae: VAE, files: list[Path], out: Path) -> None:
    """As research scripts do it, for the image and its mirror image: read, crop, encode, one .npy each."""
    out.mkdir(exist_ok=True)
    for i, file in enumerate(files):
        pixels = torch.from_numpy(center_crop(decode_rgb(file.read_bytes()), SIZE).copy()).permute(2, 0, 1)
        x = (pixels / 127.5 - 1)[None].to(vae.device)
        for flip, image in enumerate((x, x.flip(3))):
            np.save(out / f"{i}-{flip}.npy", vae.moments(image)[0].half().cpu().numpy())
