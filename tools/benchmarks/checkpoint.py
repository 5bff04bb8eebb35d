"""Checkpoints beside the disk: GB/s of saving, and of verifying and loading, over those of bare files with the same
bytes and of torch.save and torch.load; and how long an asynchronous save keeps training from going on."""

import io
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from operator import truediv
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint._nested_dict import flatten_state_dict

from benchmarks import Figures, Targets
from benchmarks.memory import on_ranks
from data.batches.batch import Batch
from data.sets.form import ImageForm
from models.backbones.dit import DiT
from models.objectives.denoising import denoising_loss
from models.paths.registry import PATHS
from trainer.checkpoints import folder as checkpoint
from trainer.checkpoints.config import CheckpointConfig
from trainer.checkpoints.folder import CHECKPOINTS
from trainer.checkpoints.saver import Saver
from trainer.engines.base import Engine
from trainer.engines.build import build_engine
from trainer.engines.config import EngineConfig, OptimConfig
from trainer.engines.ema import local_shards
from trainer.ranks import Ranks

# as many tensors as DiT-B/2, of twice its size
MODEL = DiT.Config.model_validate({"depth": 12, "width": 1088, "heads": 17})
FORM = ImageForm((4, 32, 32), 1000, None)
ROUNDS, KINDS = 9, ("ours", "plain", "torch")  # each kind is first, second and third as often
FILLER = "filler"  # a file of a rank that is one hole, as large as its part of the state
IMAGES = 1  # of a rank, in the gradients that are computed beside a save


def measure() -> tuple[Figures, Targets]:
    """A DiT with optimizer and EMA, 4.2 GB; one rank (single), two (fsdp: each writes its half, the bare files too).
    All is written to the disk of the current folder itself (fsync) and read from it (the cache forgets it before). The
    kinds take turns; ratios are medians of those of a turn."""
    figures, targets = {}, {"async_blocked_over_sync": ("<", 0.15)}
    for ranks in (1, 2):
        with tempfile.TemporaryDirectory(dir=".") as folder:
            seconds, gigabytes = on_ranks(ranks, _rank, Path(folder).resolve())[0]
        for verb in ("save", "load"):
            for kind in KINDS:
                took = seconds[f"{verb}_{kind}"]
                figures[f"{verb}_{kind}_gb_per_second_{ranks}"] = gigabytes / statistics.median(took)
                ratios = map(truediv, took, seconds[f"{verb}_ours"])
                figures |= {f"{verb}_over_{kind}_{ranks}": statistics.median(ratios)} if kind != "ours" else {}
            targets[f"{verb}_over_plain_{ranks}"] = (">=", 0.9)
    for kind in ("sync", "blocked", "gradients_beside", "gradients"):
        figures[f"{kind}_seconds"] = statistics.median(seconds[kind])
    figures["async_blocked_over_sync"] = statistics.median(map(truediv, seconds["blocked"], seconds["sync"]))
    return figures, targets


def _rank(place: Ranks, folder: Path) -> tuple[dict[str, list[float]], float]:
    """Seconds of each turn, by kind, and the GB of the state."""
    network = DiT(MODEL, channels=4, side=32, num_classes=1000)
    gigabytes = 4 * 4 * sum(weight.numel() for weight in network.parameters()) / 1e9
    config = EngineConfig.model_validate({"engine": "single" if place.world_size == 1 else "fsdp"})
    engine = build_engine(config, OptimConfig.model_validate({}), network, place)
    state = engine.state()
    tensors = local_shards({key: tensor.detach() for key, tensor in flatten_state_dict(state)[0].items()})
    list(map(torch.Tensor.normal_, tensors))  # the moments have no memory yet
    with (folder / f"{FILLER}{place.rank}").open("wb") as filler:
        filler.truncate(sum(tensor.nbytes for tensor in tensors))
    seconds = _turns(folder, state, tensors) | (_beside_training(folder, engine) if place.world_size > 1 else {})
    return {kind: took[1:] for kind, took in seconds.items()}, gigabytes  # the first turn warms up


def _turns(folder: Path, state: dict[str, dict], tensors: list[torch.Tensor]) -> dict[str, list[float]]:
    rank, ours = dist.get_rank(), folder / f"{0:012d}"
    file = folder / f"file{rank}"
    buffers = [tensor.numpy().reshape(-1).view("u1").data for tensor in tensors]

    def write(fill: Callable[[io.FileIO], None]) -> None:
        with file.open("wb", buffering=0) as stream:
            fill(stream)
            os.fsync(stream.fileno())

    def read() -> None:
        with file.open("rb", buffering=0) as stream:
            list(map(stream.readinto, buffers))

    ways = {
        "ours": (lambda: checkpoint.save(folder, 0, state, "", FORM), lambda: checkpoint.load(ours, state)),
        "plain": (lambda: write(lambda stream: stream.writelines(buffers)), read),
        "torch": (lambda: write(partial(torch.save, tensors)), lambda: torch.load(file)),
    }
    seconds = {f"{verb}_{kind}": [] for verb in ("save", "load") for kind in KINDS}
    for i in range(ROUNDS + 1):
        for kind in KINDS[i % 3 :] + KINDS[: i % 3]:
            for verb, way in zip(("save", "load"), ways[kind], strict=True):
                _settle(folder)
                seconds[f"{verb}_{kind}"].append(_seconds(way))
            shutil.rmtree(ours, ignore_errors=True)
            file.unlink(missing_ok=True)
    return seconds


def _beside_training(folder: Path, engine: Engine) -> dict[str, list[float]]:
    """Seconds of a synchronous save; of what an asynchronous one keeps training from going on, before next gradients
    and before the next update; of these gradients, with that save beside them and without."""
    seconds = {"sync": [], "blocked": [], "gradients_beside": [], "gradients": []}
    configs = [CheckpointConfig.model_validate({"keep": 1, "asynchronous": beside}) for beside in (False, True)]
    savers = [Saver(folder, config, 600) for config in configs]
    x, one = torch.randn(IMAGES, 4, 32, 32), torch.ones(IMAGES, dtype=torch.int64)
    batch = Batch(x, torch.randn_like(x), torch.rand(IMAGES), one, one, one.bool(), group_size=1, in_groups=False)

    def save(number: int) -> None:
        savers[number % 2].save(number, {CHECKPOINTS: engine.state()}, "", FORM, {})

    def gradients() -> None:
        engine.backward(denoising_loss(engine, PATHS["linear"](), batch).sum())

    for number in range(0, 2 * (ROUNDS + 1), 2):
        _settle(folder)
        seconds["sync"].append(_seconds(partial(save, number)))
        _settle(folder)
        seconds["gradients"].append(_seconds(gradients))
        begun = _seconds(partial(save, number + 1))
        seconds["gradients_beside"].append(_seconds(gradients))
        seconds["blocked"].append(begun + _seconds(savers[1].wait_for_copy))
        savers[1].wait()
    return seconds


def _settle(folder: Path) -> None:
    """The disk has nothing else to do, the cache nothing of the files, and the system as much memory at hand that it
    had in use just before: a virtual machine gives back what is free, and takes its time to get it again."""
    dist.barrier()
    os.sync()
    with (folder / f"{FILLER}{dist.get_rank()}").open("rb", buffering=0) as filler:
        while filler.read(1 << 24):
            pass
    dist.barrier()
    for file in filter(Path.is_file, folder.rglob("*")):
        with file.open() as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    dist.barrier()


def _seconds(way: Callable[[], object]) -> float:
    """Until the slowest rank has done it."""
    dist.barrier()
    start = time.perf_counter()
    way()
    dist.barrier()
    return time.perf_counter() - start
