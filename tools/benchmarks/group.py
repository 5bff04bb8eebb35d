"""What groups cost: the time of a training step for N images a group, over N = 1, beside the ratio of its FLOPs."""

import statistics
import time

import torch

from benchmarks import Figures, Targets
from benchmarks.network import dit, wait
from models.backbones.dit import DiT
from models.backbones.flops import forward_multiply_adds

SIZES, ROUNDS = (1, 2, 4, 8), 7


def measure() -> tuple[Figures, Targets]:
    """DiT-S/2 on 32 x 32 latents (DiT-XL/2 in bf16 on a GPU), a fixed number of images. Group sizes take turns."""
    gpu = torch.cuda.is_available()
    images, size = (64, "XL") if gpu else (8, "S")
    network = dit(size)
    seconds = step_seconds(network, images, SIZES, ROUNDS)
    flops = {n: forward_multiply_adds(network, images, 4, 32, n) for n in SIZES}
    figures: Figures = {f"seconds_N{n}": statistics.median(seconds[n]) for n in SIZES}
    targets: Targets = {}
    for n in SIZES[1:]:
        figures[f"time_ratio_N{n}"] = statistics.median(t / one for t, one in zip(seconds[n], seconds[1], strict=True))
        figures[f"flops_ratio_N{n}"] = flops[n] / flops[1]
        figures[f"time_over_flops_N{n}"] = figures[f"time_ratio_N{n}"] / figures[f"flops_ratio_N{n}"]
        figures[f"difference_N{n}"] = abs(figures[f"time_over_flops_N{n}"] - 1)
        targets[f"difference_N{n}"] = ("<=", 0.1)
    return figures, targets


def step_seconds(network: DiT, images: int, sizes: tuple[int, ...], rounds: int) -> dict[int, list[float]]:
    """Seconds of forward, backward and AdamW for each group size, `rounds` times in turn."""
    device = next(network.parameters()).device
    gpu = device.type == "cuda"
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    x = torch.randn(images, 4, 32, 32, device=device)
    t, label = torch.rand(images, device=device), torch.arange(images, device=device)
    slot = label % 16
    seconds: dict[int, list[float]] = {n: [] for n in sizes}
    for i in range(-1, rounds):
        for n in sizes:
            wait()
            start = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16, enabled=gpu):
                loss = network(x, t, label, slot, n).float().square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            wait()
            if i >= 0:  # the first turn warms up
                seconds[n].append(time.perf_counter() - start)
    return seconds
