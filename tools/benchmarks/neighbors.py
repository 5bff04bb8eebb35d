"""The exact neighbour graph: seconds, and how near it comes to the machine's matrix products."""

import time
from typing import Literal

import numpy as np
import torch

from benchmarks import Figures, Targets
from data.neighbors.exact import ExactSearch

NEIGHBORS, BLOCK = 64, 1024


def measure() -> tuple[Figures, Targets]:
    """100,000 x 512 on a CPU; with a GPU also ImageNet's 1,281,167 x 1024. Random unit vectors in float16."""
    figures: Figures = {}
    precisions: tuple[Literal["bf16", "fp32"], ...] = ("fp32", "bf16")
    for precision in precisions:
        seconds, peak = _search(100_000, 512, torch.device("cpu"), precision)
        figures[f"{precision}_seconds"] = seconds
        figures[f"{precision}_share_of_matmul_peak"] = 2 * 100_000**2 * 512 / seconds / peak
    if torch.cuda.is_available():
        figures["imagenet_seconds"], _ = _search(1_281_167, 1024, torch.device("cuda"), "bf16")
    return figures, {"fp32_share_of_matmul_peak": (">=", 0.6)}


def _search(images: int, width: int, device: torch.device, precision: Literal["bf16", "fp32"]) -> tuple[float, float]:
    """Seconds for all neighbours, and FLOP/s of large products of that precision, the best of before and after."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((images, width), dtype=np.float32)
    features = (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float16)
    peaks = [_peak(device, precision)]
    start = time.perf_counter()
    search = ExactSearch(features, device, precision)
    for i in range(0, images, BLOCK):
        search.nearest(np.arange(i, min(i + BLOCK, images)), NEIGHBORS)
    seconds = time.perf_counter() - start
    return seconds, max(*peaks, _peak(device, precision))


def _peak(device: torch.device, precision: str) -> float:
    side = 4096
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best
