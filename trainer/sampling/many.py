"""Make any number of samples with any number of processes, here or on many nodes: for FID and the like.

Their groups, whose classes follow `sample.labels`, are split into parts. A part is claimed by one process and made in
one batch, and its randomness depends only on the numbers of its groups. So any number of processes makes the same
images, bit for bit on one kind of machine, and the same command resumes where it stopped.
"""

import itertools
import zipfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from data.stores.claims import Claims, wait_for_lock
from data.stores.files import appearing, disk_errors, write_json
from data.stores.shards import agree_on_settings
from trainer.build import find_form
from trainer.checkpoints.weights import WeightSource
from trainer.config.tree import Config
from trainer.errors import RunError
from trainer.ranks import local_device
from trainer.sampling.decode import make_decoder
from trainer.sampling.finite import not_finite
from trainer.sampling.generate import generate_groups
from trainer.sampling.labels import deal_classes
from trainer.sampling.networks import load
from trainer.sampling.pictures import to_uint8
from trainer.sampling.samples import RECORDED_LATER, describe

PARTS, SAMPLES, RECORD = "parts", "samples.npz", "samples.json"


def sample_many(
    source: WeightSource,
    config: Config,
    number: int,
    out: Path,
    form: Literal["npz", "png"],
    process: int = 0,
    processes: int = 1,
) -> bool:
    """Make the parts that no other process makes; return whether all parts, and so all `number` samples, are then
    there.

    npz: samples.npz with arr_0 (number, H, W, C) uint8 and arr_1, the classes; png: a file per sample, in a folder per
    class. Both are in the order of the groups. Raise DataError if `out` holds other samples, or the disk is full, and
    RunError if a sample is not finite.
    """
    with disk_errors(out):
        return _sample_many(source, config, number, out, form, process, processes)


def _sample_many(
    source: WeightSource,
    config: Config,
    number: int,
    out: Path,
    form: Literal["npz", "png"],
    process: int,
    processes: int,
) -> bool:
    record = describe(source, config) | {"number": number, "form": form}
    size, num_classes = config.sample.group_size, find_form(config, source).num_classes
    whole = number % (num_classes * size) == 0  # or else older versions made more of some classes
    before = RECORDED_LATER | ({} if whole else {"labels": "groups in turn"})
    agree_on_settings(out, {name: value for name, value in record.items() if name != "per_class"}, before)
    if (out / RECORD).exists():
        return True
    classes, kept = deal_classes(config.sample, number, num_classes)
    label = classes.repeat(kept)
    per_part = max(config.sample.batch // size, 1)
    groups = np.split(np.arange(len(kept)), range(per_part, len(kept), per_part))  # of each part
    sizes = [int(kept[own].sum()) for own in groups]
    first = [0, *itertools.accumulate(sizes)]
    names = [f"part-{part:06d}.npz" for part in range(len(groups))]

    if local_device().type == "cpu":
        torch.set_num_threads(1)  # sums depend on the number of threads, and that on the number of processes
    loaded = load(source, config)
    images = loaded.images
    decode = make_decoder(images.vae, images.shape[0], loaded.device)
    claims = Claims(out / PARTS, names, process * len(names) // processes, complete=out / RECORD)
    with tqdm(total=number, unit="img", desc="sample", initial=_made(out, names, sizes)) as bar:
        for part in claims:
            own = groups[part]
            with loaded.inference():
                made = generate_groups(loaded.networks, config, images.shape, own, classes[own], loaded.device)
            keep = torch.from_numpy((np.arange(size) < kept[own, None]).ravel())
            decoded = made._replace(images=decode(made.images.cpu()[keep]), finite=made.finite.cpu()[keep])
            if wrong := not_finite(decoded, config.sample, source.weights, first[part]):
                raise RunError(wrong)
            pixels = to_uint8(decoded.images)
            if form == "png":
                _write_pngs(out, pixels, label, first[part])
            stored: dict[str, Any] = {"images": pixels} if form == "npz" else {}
            with appearing(out / PARTS / names[part]) as target:
                np.savez(target, evaluations=made.evaluations, **stored)
            claims.release(part)
            bar.update(len(pixels))
    parts = [out / PARTS / name for name in names]
    if not all(path.exists() for path in parts):
        return False
    with wait_for_lock(out, RECORD):
        if not (out / RECORD).exists():
            if form == "npz":
                _join(out / SAMPLES, parts, label)
            most = max(int(np.load(path)["evaluations"]) for path in parts)
            write_json(out / RECORD, record | {"evaluations": most})
    return True


def _made(out: Path, names: list[str], sizes: list[int]) -> int:
    """Return how many samples exist."""
    return sum(size for name, size in zip(names, sizes, strict=True) if (out / PARTS / name).exists())


def _write_pngs(out: Path, pixels: np.ndarray, label: np.ndarray, first: int) -> None:
    for sample, image in enumerate(pixels, start=first):
        path = out / f"{label[sample]:04d}" / f"{sample:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        with appearing(path) as target:
            Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(target, "png")


def _join(path: Path, parts: list[Path], label: np.ndarray) -> None:
    """Join all parts in one .npz, with one part in memory at a time: 50,000 images of 256 pixels are 10 GB."""
    shape = (len(label), *np.load(parts[0])["images"].shape[1:])
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with appearing(path) as target, zipfile.ZipFile(target, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_2_0(member, header)
            for part in parts:
                member.write(np.load(part)["images"].tobytes())
        with archive.open("arr_1.npy", "w") as member:
            np.save(member, label)
