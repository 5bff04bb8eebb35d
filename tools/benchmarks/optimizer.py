"""What groups of parameters cost: AdamW with `optim.decay=matrices` over `all`, beside a training step of DiT-S/2."""

import statistics
import time

import torch
from torch.optim import Optimizer

from benchmarks import Figures, Targets
from benchmarks.group import step_seconds
from benchmarks.network import dit, wait
from trainer.engines.config import OptimConfig
from trainer.engines.optimizer import make_optimizer

UPDATES, ROUNDS = 10, 7


def measure() -> tuple[Figures, Targets]:
    """One process; a step of 8 images (64 on a GPU) as in `group`. Steps and updates by both rules take turns."""
    images = 64 if torch.cuda.is_available() else 8
    network = dit("S")
    weights: dict[str, torch.Tensor] = dict(network.named_parameters())
    optimizers = {
        rule: make_optimizer(weights, OptimConfig.model_validate({"decay": rule})) for rule in ("all", "matrices")
    }
    seconds: dict[str, list[float]] = {"step": [], **{rule: [] for rule in optimizers}}
    for _ in range(ROUNDS):
        seconds["step"] += step_seconds(network, images, (1,), 1)[1]
        for weight in weights.values():
            weight.grad = torch.zeros_like(weight)
        for rule, optimizer in optimizers.items():
            seconds[rule].append(_seconds(optimizer))
    figures: Figures = {f"{name}_seconds": statistics.median(values) for name, values in seconds.items()}
    turns = zip(seconds["step"], seconds["all"], seconds["matrices"], strict=True)
    figures["step_ratio"] = statistics.median(1 + (matrices - together) / step for step, together, matrices in turns)
    return figures, {"step_ratio": ("<=", 1.01)}


def _seconds(optimizer: Optimizer) -> float:
    """Of one update, the mean of UPDATES after one that is not counted."""
    start = 0.0
    for i in range(UPDATES + 1):
        if i == 1:
            wait()
            start = time.perf_counter()
        optimizer.step()
    wait()
    return (time.perf_counter() - start) / UPDATES
