"""What averages of the weights cost: the EMA's update, and two of post-hoc EMA, beside a training step of DiT-S/2."""

import statistics
import time

import torch

from benchmarks import Figures, Targets
from benchmarks.group import step_seconds
from benchmarks.network import dit, wait
from trainer.engines.config import OptimConfig
from trainer.engines.ema import EMA, make_averages

STDS = (0.05, 0.10)
UPDATES, ROUNDS = 10, 7


def measure() -> tuple[Figures, Targets]:
    """One process; forward, backward and AdamW of 8 images (64 on a GPU) of 32 x 32 x 4 are one `step`. It and the
    updates take turns, each update the mean of several: the ratios are medians of those of a turn."""
    gpu = torch.cuda.is_available()
    images = 64 if gpu else 8
    network = dit("S")
    weights: dict[str, torch.Tensor] = dict(network.named_parameters())
    averages = make_averages(weights, OptimConfig.model_validate({"power_ema": STDS}))
    kinds = {"ema": [averages.pop("ema")], "posthoc": list(averages.values())}
    seconds: dict[str, list[float]] = {"step": [], "ema": [], "posthoc": []}
    for _ in range(ROUNDS):
        seconds["step"] += step_seconds(network, images, (1,), 1)[1]
        for kind, emas in kinds.items():
            seconds[kind].append(_seconds(emas))
    figures: Figures = {f"{kind}_seconds": statistics.median(values) for kind, values in seconds.items()}
    moved = 3 * 4 * sum(weight.numel() for weight in weights.values())  # two read, one written
    figures["ema_gigabytes_per_second"] = moved / figures["ema_seconds"] / 1e9
    for kind in kinds:
        ratios = [update / step for update, step in zip(seconds[kind], seconds["step"], strict=True)]
        figures[f"{kind}_over_step"] = statistics.median(ratios)
    return figures, {"ema_over_step": ("<", 0.01), "posthoc_over_step": ("<", 0.02)}


def _seconds(emas: list[EMA]) -> float:
    """Of one update of all of them, the mean of UPDATES after one that is not counted."""
    start = 0.0
    for i in range(UPDATES + 1):
        if i == 1:
            wait()
            start = time.perf_counter()
        for ema in emas:
            ema.update(100_000 + i)
    wait()
    return (time.perf_counter() - start) / UPDATES
