"""Sampling: what it costs besides the network, and what groups cost, everywhere or in the noisiest part only."""

import time

import numpy as np
import torch
from torch import nn

from benchmarks import Figures, Targets
from benchmarks.network import wait
from models.backbones.registry import make_network
from trainer.config.tree import Config, parse_config
from trainer.sampling.generate import generate_groups
from trainer.sampling.networks import Networks

SHAPE, CLASSES = (4, 32, 32), 1000
SIZES = {
    "12M": {"depth": 12, "width": 240, "heads": 4},
    "33M": {"size": "S"},
    "130M": {"size": "B"},
}
IMAGES, STEPS, ROUNDS, SECONDS = 4, 4, 4, 75
NOISIEST = [None, float(2 * np.log(0.4 / 0.6))]  # log-SNR of the noisiest 40 % of the steps of the linear path
WINDOWS = {
    "none": (1, None),
    "uc4": (4, None),
    "uc4_window": (4, NOISIEST),
    "uc16": (16, None),
    "uc16_window": (16, NOISIEST),
}


def measure() -> tuple[Figures, Targets]:
    """Guided Euler steps on latents of 32 x 32: with the network's bare calls, and ways to group, in turn."""
    figures: Figures = {}
    targets: Targets = {}
    for name, size in SIZES.items():
        config = _config(size, {"steps": STEPS, "guidance": 1.5, "sampler": "euler"})
        network = _network(config)
        _bare_seconds(network)  # warms up
        bare = whole = 0.0
        rounds = 0
        while bare + whole < SECONDS:  # in turn, as the machine may be faster at one time than at another
            bare += _bare_seconds(network)
            whole += _seconds(network, config, IMAGES)
            whole += _seconds(network, config, IMAGES)
            bare += _bare_seconds(network)
            rounds += 2
        figures[f"{name}_images_per_second"] = IMAGES * rounds / whole
        figures[f"{name}_over_bare"] = bare / whole
        targets[f"{name}_over_bare"] = (">=", 0.97)
    network = _network(_config(SIZES["12M"], {}))
    seconds: dict[str, list[float]] = {name: [] for name in WINDOWS}
    for _ in range(ROUNDS):
        for name, (uncond, window) in WINDOWS.items():
            sample = {"steps": 5, "sampler": "euler", "uncond_group_size": uncond, "group_window": window}
            seconds[name].append(_seconds(network, _config(SIZES["12M"], sample), 16))
    cost = {name: min(values) for name, values in seconds.items()}
    for size in ("uc4", "uc16"):
        figures[f"{size}_over_no_groups"] = cost[size] / cost["none"]
        figures[f"{size}_window_over_no_groups"] = cost[f"{size}_window"] / cost["none"]
        figures[f"{size}_window_over_no_window"] = cost[f"{size}_window"] / cost[size]
    return figures, targets


def _config(model: dict, sample: dict) -> Config:
    return parse_config(
        {"run": "unused", "model": model, "sample": {"cond_group_size": 1, "uncond_group_size": 1, **sample}}
    )


def _network(config: Config) -> nn.Module:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return make_network(config.model, *SHAPE[:2], CLASSES, SHAPE[0]).to(device).eval()


def _seconds(network: nn.Module, config: Config, images: int) -> float:
    """Of generating `images` of them, from the drawing of noise to the result."""
    groups = np.arange(images // config.sample.group_size)
    device = next(network.parameters()).device
    start = time.perf_counter()
    generate_groups(Networks(network), config, SHAPE, groups, groups % CLASSES, device)
    wait()
    return time.perf_counter() - start


@torch.no_grad()
def _bare_seconds(network: nn.Module) -> float:
    """Of as many calls of the network as STEPS guided steps take."""
    device = next(network.parameters()).device
    x, t = torch.randn(IMAGES, *SHAPE, device=device), torch.rand(IMAGES, device=device)
    number = torch.arange(IMAGES, device=device)
    start = time.perf_counter()
    for _ in range(2 * STEPS):
        network(x, t, number, number)
    wait()
    return time.perf_counter() - start
