"""What the trainer costs: its images/s over those of a bare PyTorch loop with the same network and the same batches."""

import statistics
import tempfile
import time

import torch

from benchmarks import Figures, Targets
from benchmarks.network import wait
from data.batches.batch import Batch
from data.batches.steps import Steps
from data.sets.form import form_of
from data.sets.registry import open_images
from models.objectives.denoising import denoising_loss
from models.paths.registry import make_path
from trainer.build import build_network
from trainer.config.tree import Config, load_config
from trainer.loop import train

STEPS, WARM_UP, ROUNDS = 40, 5, 5


def measure() -> tuple[Figures, Targets]:
    """The demo's network and batches, one process. The two loops take turns: a drift of the machine hits both."""
    trainer, bare = [], []
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory() as folder:
            overrides = [f"run={folder}", "engine=single", f"train.images={STEPS * 128}", "train.sample_every=0"]
            config = load_config("configs/digits.yaml", overrides)
            trainer.append(_trainer_seconds(config))
            bare.append(_bare_seconds(config))
    ratio = statistics.median(b / t for b, t in zip(bare, trainer, strict=True))
    batch = config.train.global_batch
    figures = {
        "trainer_images_per_second": batch / statistics.median(trainer),
        "bare_images_per_second": batch / statistics.median(bare),
        "trainer_over_bare": ratio,
    }
    return figures, {"trainer_over_bare": (">=", 0.95)}


def _trainer_seconds(config: Config) -> float:
    """Mean seconds of a step of the real `train`, all but the final checkpoint; `stop_requested` is the clock."""
    ticks = []

    def tick() -> bool:
        if len(ticks) + 1 in (WARM_UP, STEPS):
            wait()
        ticks.append(time.perf_counter())
        return False

    train(config, stop_requested=tick)
    return (ticks[-1] - ticks[WARM_UP - 1]) / (STEPS - WARM_UP)


def _bare_seconds(config: Config) -> float:
    """Mean seconds of forward, backward and AdamW on the same batches, made before: no EMA, clipping, log, loader."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = build_network(config, form_of(open_images(config.data))).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True)
    path = make_path(config.path)
    steps, start = _batches(config, device), 0.0
    for i, batches in enumerate(steps):
        if i == WARM_UP:
            wait()
            start = time.perf_counter()
        for batch in batches:
            denoising_loss(network, path, batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    wait()
    return (time.perf_counter() - start) / (STEPS - WARM_UP)


def _batches(config: Config, device: torch.device) -> list[list[Batch]]:
    steps = Steps(config.groups, config.train.global_batch, config.model.slots, config.seed, 0, STEPS)
    batches_of_steps = open_images(config.data).batches(steps, lambda *plan: None)
    return [[batch.to(device) for batch in micro_batches] for micro_batches in batches_of_steps]
