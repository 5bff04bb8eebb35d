"""What each engine keeps in memory, at the peak of a training step, over the ideal: weights, gradients, AdamW's moments
and EMA in fp32 (20 bytes a parameter), each divided by as many ranks as the engine promises."""

import ctypes
import gc
import os
import re
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.queues import SimpleQueue
from pathlib import Path

import torch
from torch.multiprocessing.spawn import spawn

from benchmarks import Figures, Targets
from data.batches.batch import Batch
from models.backbones.dit import DiT
from models.objectives.denoising import denoising_loss
from models.paths.registry import PATHS
from slurm.tasks import free_port
from trainer.engines.base import Engine
from trainer.engines.build import build_engine
from trainer.engines.config import EngineConfig, OptimConfig
from trainer.ranks import Ranks, process_group

# 134 M parameters, as deep as DiT-XL: a block is 1/28 of it
MODEL = DiT.Config.model_validate({"depth": 28, "width": 512, "heads": 8})
SMALL = DiT.Config.model_validate({"depth": 2, "width": 64, "heads": 2})
CHANNELS, SIDE, CLASSES = 4, 4, 1000  # four tokens
RANKS, STEPS = 4, 3
ENGINES = {  # bytes a parameter: weights + gradients + moments + EMA
    "single": ({"engine": "single"}, 4 + 4 + 8 + 4),
    "ddp": ({"engine": "ddp"}, 4 + 4 + 8 + 4),
    "fsdp": ({"engine": "fsdp"}, (4 + 4 + 8 + 4) / RANKS),
    "hsdp": ({"engine": "hsdp", "shard_size": 2}, (4 + 4 + 8 + 4) / 2),
    "zero0": ({"engine": "deepspeed", "zero": 0}, 4 + 4 + 8 + 4),
    "zero1": ({"engine": "deepspeed", "zero": 1}, 4 + 4 + 8 / RANKS + 4),
    "zero2": ({"engine": "deepspeed", "zero": 2}, 4 + (4 + 8) / RANKS + 4),
    "zero3": ({"engine": "deepspeed", "zero": 3}, (4 + 4 + 8 + 4) / RANKS),
}
# Each tensor over 64 KB gets pages of its own, which the system has back when it is freed: otherwise malloc keeps some,
# for tensors to come, and the peak would count them.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16), "MALLOC_TRIM_THRESHOLD_": str(1 << 16), "MALLOC_ARENA_MAX": "2"}


def measure() -> tuple[Figures, Targets]:
    """On CPUs, gloo: the growth of a process's peak memory over its memory before, in MB of the rank that has most.

    `mb_*`: in the steps, after the first one; `start_mb_*`: before, when the network is built whole, then cut.
    """
    with torch.device("meta"):
        parameters = sum(weight.numel() for weight in DiT(MODEL, CHANNELS, SIDE, CLASSES).parameters())
    os.environ |= MALLOC  # of the processes that it starts
    figures: Figures = {"parameters": parameters}
    targets: Targets = {}
    for name, (config, ideal) in ENGINES.items():
        peaks = on_ranks(1 if name == "single" else RANKS, _peaks, config)
        start, peak = map(max, zip(*peaks, strict=True))
        figures |= {f"start_mb_{name}": start, f"mb_{name}": peak, f"ideal_mb_{name}": ideal * parameters / 1e6}
        figures[f"over_ideal_{name}"] = peak / figures[f"ideal_mb_{name}"]
        targets[f"over_ideal_{name}"] = ("<=", 1.15)
    return figures, targets


def on_ranks(ranks: int, function: Callable, *arguments: object) -> list:
    """What function(Ranks, *arguments) returns on so many ranks: new processes, on CPUs. An error of one is raised."""
    threads = max(1, (os.cpu_count() or 1) // ranks)
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(threads)}  # for them
    answers = get_context("spawn").SimpleQueue()
    spawn(_on_rank, (ranks, free_port(), answers, function, arguments), ranks)
    return [answers.get() for _ in range(ranks)]


def _on_rank(rank: int, ranks: int, port: int, answers: SimpleQueue, function: Callable, arguments: tuple) -> None:
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in places.items()}, MASTER_ADDR="127.0.0.1")
    with process_group() as place:
        answers.put(function(place, *arguments))


def _peaks(place: Ranks, config: dict) -> tuple[float, float]:
    """Before and in the steps."""
    _train(SMALL, config, place, STEPS)  # first, that the code which is loaded for it does not count
    before = reset_peak()
    engine = _train(MODEL, config, place, 1)
    start = megabytes("VmHWM")
    reset_peak()
    _train_on(engine, STEPS)
    return start - before, megabytes("VmHWM") - before


def _train(model: DiT.Config, config: dict, place: Ranks, steps: int) -> Engine:
    torch.manual_seed(0)
    network = DiT(model, CHANNELS, SIDE, CLASSES)
    engine = build_engine(EngineConfig.model_validate(config), OptimConfig.model_validate({}), network, place)
    _train_on(engine, steps)
    return engine


def _train_on(engine: Engine, steps: int) -> None:
    """Steps of one image each: next to nothing is kept of the forward pass."""
    x, one = torch.randn(1, CHANNELS, SIDE, SIDE), torch.ones(1, dtype=torch.int64)
    batch = Batch(x, torch.randn_like(x), torch.rand(1), one, one, one.bool(), group_size=1, in_groups=False)
    for _ in range(steps):
        with engine.accumulating(last=True):
            engine.backward(denoising_loss(engine, PATHS["linear"](), batch).sum())
        engine.step(1e-4)


def reset_peak() -> float:
    """The peak is what there is now, and this, in MB."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM is VmRSS again
    return megabytes("VmRSS")


def megabytes(field: str) -> float:
    """A field of /proc/self/status, as VmRSS or VmHWM."""
    (kilobytes,) = re.findall(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kilobytes) * 1024 / 1e6
