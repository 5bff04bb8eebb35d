"""Reading latents: at random from shards, over one file per image and over webdataset in sequence; the whole loader;
and the memory of a rank that trains on an index of ImageNet's size."""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from webdataset.compat import WebDataset

from benchmarks import Figures, Targets
from benchmarks.memory import megabytes
from benchmarks.plan import IMAGES, class_clusters
from data.batches.loader import BatchDataset, GroupSampler
from data.batches.plan import GroupsConfig, plan_epoch, steps_per_epoch
from data.sets.latents import Latents
from data.stores.files import write_json
from data.stores.shards import INDEX, MANIFEST, agree_on_settings, finish, shard_names, write_shard
from data.stores.store import Store

NUMBER, SHARDS, BATCH, ROUNDS = 8192, 8, 256, 5
SHAPE = (2, 8, 32, 32)


def measure() -> tuple[Figures, Targets]:
    """8192 latents of 256-pixel images, warm cache, one thread; the ways of reading take turns."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write(folder)
        rates = _reading(folder)
        figures: Figures = {f"{kind}_images_per_second": rate for kind, rate in rates.items()}
        figures["over_one_file_per_image"] = rates["ours"] / rates["files"]
        figures["over_webdataset"] = rates["ours"] / rates["webdataset"]
        figures["loader_images_per_second_of_a_worker"] = _loader(folder)
        _grow(folder)
        for variant in ("light", "full"):
            figures[f"rank_gigabytes_{variant}"] = _memory(folder, variant)
    targets: Targets = {"over_one_file_per_image": (">=", 10.0), "over_webdataset": (">=", 10.0)}
    return figures, targets | {f"rank_gigabytes_{variant}": ("<", 1.5) for variant in ("light", "full")}


def _write(folder: Path) -> None:
    """The same moments as a store, and as one .npy for each image and mirror image."""
    moments = np.random.default_rng(0).normal(size=(NUMBER, *SHAPE)).astype(np.float16)
    settings = {"name": None, "scaling_factor": 0.18215, "shift_factor": 0.0}
    agree_on_settings(folder / "latents", settings)
    for shard, part in zip(shard_names("latents", SHARDS), np.split(np.arange(NUMBER), SHARDS), strict=True):
        keys = [f"n{i % 1000:08d}/n{i % 1000:08d}_{i}" for i in part]
        write_shard(folder / "latents" / shard, keys, (part % 1000).tolist(), {"moments": moments[part]}, [])
    finish(folder / "latents", "latents", SHARDS, 1000, 0)
    (folder / "files").mkdir()
    for i, both in enumerate(moments):
        for flip in (0, 1):
            np.save(folder / "files" / f"{i}-{flip}.npy", both[flip])


def _reading(folder: Path) -> dict[str, float]:
    """Images/s, medians."""
    store = Store(folder / "latents", json.loads((folder / "latents" / MANIFEST).read_text()))
    rng = np.random.default_rng(1)
    urls = [str(folder / "latents" / shard) for shard in shard_names("latents", SHARDS)]

    def draw() -> tuple[np.ndarray, np.ndarray]:
        return rng.integers(NUMBER, size=BATCH), rng.integers(2, size=BATCH)

    def ours(batches: int = 100) -> int:
        for _ in range(batches):
            numbers, flip = draw()
            store.read("moments", numbers, flip)
        return batches * BATCH

    def files(batches: int = 10) -> int:
        for _ in range(batches):
            numbers, flip = draw()
            paths = [folder / "files" / f"{i}-{f}.npy" for i, f in zip(numbers.tolist(), flip.tolist(), strict=True)]
            np.stack([np.load(path) for path in paths])
        return batches * BATCH

    def sequence() -> int:
        samples: Any = WebDataset(urls, shardshuffle=False).decode().to_tuple("moments.npy", "cls")
        for _ in samples.batched(BATCH):
            pass
        return NUMBER

    rates: dict[str, list[float]] = {"ours": [], "files": [], "webdataset": []}
    for timed in [False] + [True] * ROUNDS:  # the first round warms the cache
        for kind, read in (("ours", ours), ("files", files), ("webdataset", sequence)):
            rate = _rate(read)
            if timed:
                rates[kind].append(rate)
    return {kind: statistics.median(values) for kind, values in rates.items()}


def _rate(read: Callable[[], int]) -> float:
    start = time.perf_counter()
    number = read()
    return number / (time.perf_counter() - start)


def _loader(folder: Path) -> float:
    """Images/s of one worker: reading, posterior sampling, noise, timesteps, slots."""
    images = Latents(str(folder / "latents"), None, None, True, {})
    config = GroupsConfig.model_validate({"variant": "light", "query": "random"})
    plan = plan_epoch(config, images.label, None, BATCH, 0, 0)
    epoch = steps_per_epoch(NUMBER, BATCH)
    dataset = BatchDataset(images, config, max_group_size=16, seed=0)

    def read() -> int:
        for micro_batches in GroupSampler(lambda _: plan, epoch, 0, epoch, 0, 1, None):
            dataset[micro_batches]
        return NUMBER

    read()
    return statistics.median(_rate(read) for _ in range(ROUNDS))


def _grow(folder: Path) -> None:
    """An index of ImageNet's size over the same shards, and a graph with 64 neighbours of each image."""
    store = folder / "latents"
    manifest = json.loads((store / MANIFEST).read_text())
    index = np.resize(np.load(store / INDEX), IMAGES)
    index["label"] = np.arange(IMAGES) * 1000 // IMAGES
    np.save(store / INDEX, index)
    write_json(store / MANIFEST, manifest | {"images": IMAGES})
    graph = class_clusters(index["label"].astype(np.int64), neighbors=64)
    (folder / "graph").mkdir()
    np.save(folder / "graph" / "ids.npy", graph.ids)
    np.save(folder / "graph" / "similarities.npy", graph.similarities.astype(np.float16))
    settings = {"keys": manifest["keys"]}
    write_json(folder / "graph" / MANIFEST, {"kind": "neighbors", "images": IMAGES, "settings": settings})


def _memory(folder: Path, variant: str) -> float:
    """Gigabytes at the peak of a rank that trains 20 steps, above those of one that only has the network."""
    peaks = []
    for steps in (0, 20):
        code = f"from benchmarks.read import rank; rank({str(folder)!r}, {variant!r}, {steps})"
        command = [sys.executable, "-c", f"import sys; sys.path.insert(0, 'tools'); {code}"]
        peaks.append(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]))
    return peaks[1] - peaks[0]


def rank(folder: str, variant: str, steps: int) -> None:
    """Train so many steps (0: build the network alone) and print the peak memory in gigabytes."""
    from models.backbones.registry import make_network
    from trainer.config.tree import parse_config
    from trainer.loop import train

    config = parse_config(
        {
            "run": f"{folder}/run-{variant}",
            "engine": "single",
            "data": {"name": "latents", "latents": f"{folder}/latents", "neighbors": f"{folder}/graph"},
            "model": {"depth": 1, "width": 32, "heads": 2, "patch": 8},
            "groups": {"variant": variant, "size": 4, "threshold": 0.3, "neighbors": 64},
            "train": {"images": max(steps, 1) * BATCH},
        }
    )
    if steps:
        train(config)
    else:
        make_network(config.model, 4, 32, 1000, 4)
    print(megabytes("VmHWM") / 1e3)  # getrusage would count the parent's memory as well
