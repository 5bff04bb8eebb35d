"""Small TorchScript detectors, and what ranks do with them."""

import json
import re
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from trainer.errors import RunError
from trainer.evaluation.by_detector import evaluate_images, open_detector
from trainer.ranks import process_group


class Plain(nn.Module):
    """Features (n, width) of images: random weights of the means of 4 x 4 pixels, and a square root."""

    def __init__(self, width: int, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("weight", torch.randn(48, width, generator=generator))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        small = nn.functional.adaptive_avg_pool2d(x.float() / 255, (4, 4))
        return (small.flatten(1) @ self.weight).abs().sqrt()


class WithSpatial(nn.Module):
    """(features, spatial features): a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = Plain(6)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.plain(x), nn.functional.adaptive_avg_pool2d(x.float() / 255, (2, 2))


class Conv(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.weight = nn.Conv2d(inside, outside, 3, stride)
        self.weight.weight.data *= 4

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight(x).relu()


class Mixed(nn.Module):
    """Two branches side by side, the first called `conv` as in Inception."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(12, 9, 1), nn.ReLU())
        self.other = nn.Conv2d(12, 7, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.conv(x), self.other(x)], 1)


class Inception(nn.Module):
    """The form of NVlabs's file: arguments, resizing, names of layers, output. `centre` is what it subtracts."""

    def __init__(self, centre: float = 128) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = {"conv": Conv(3, 8, 8), "conv_1": Conv(8, 12, 4), "mixed_6": Mixed(), "pool2": nn.AdaptiveAvgPool2d(1)}
        self.layers = nn.Sequential(OrderedDict(layers))
        self.output = nn.Linear(16, 10)
        self.centre = centre

    def forward(
        self, img: torch.Tensor, return_features: bool = False, use_fp16: bool = False, no_output_bias: bool = False
    ) -> torch.Tensor:
        n, c, height, width = img.shape
        theta = torch.eye(2, 3, device=img.device)
        theta[0, 2] += theta[0, 0] / width - theta[0, 0] / 299
        theta[1, 2] += theta[1, 1] / height - theta[1, 1] / 299
        grid = nn.functional.affine_grid(theta.unsqueeze(0).repeat([n, 1, 1]), [n, c, 299, 299], align_corners=False)
        x = nn.functional.grid_sample(img.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
        features = self.layers((x - self.centre) / self.centre).reshape(-1, 16)
        if return_features:
            return features
        logits = nn.functional.linear(features, self.output.weight) if no_output_bias else self.output(features)
        return logits.softmax(dim=1)


def save(module: nn.Module, path: Path) -> Path:
    torch.jit.save(torch.jit.script(module.eval()), str(path))
    return path


def save_images(path: Path, number: int, seed: int, side: int = 16, channels: int = 3) -> np.ndarray:
    """An .npz of smooth random images, of another mean and contrast for another seed; the images."""
    rng = np.random.default_rng(seed)
    small = rng.normal(110 + 5 * seed, 30 + seed, (number, side // 4, side // 4, channels))
    images = small.repeat(4, axis=1).repeat(4, axis=2) + rng.normal(0, 5, (number, side, side, channels))
    images = images.clip(0, 255).astype(np.uint8)
    np.savez(path, arr_0=images)
    return images


def evaluate_once(
    detector: Path, images: Path, reference: Path, cache: Path, out: Path, metrics: list[str] | None = None
) -> None:
    """The record of the metrics, or of all, as JSON."""
    with process_group() as ranks:
        record = evaluate_images(open_detector(str(detector), ranks), images, reference, metrics, ranks, cache)
    if record:
        out.write_text(json.dumps(record))


def arr_0(path):
    return np.load(path)["arr_0"]


def evaluated(there, world, cache, detector="plain.pt", images="made.npz", reference="real.npz", metrics=None):
    return evaluate_images(
        open_detector(str(there / detector), world), there / images, there / reference, metrics, world, cache
    )


def fails(message, *arguments, **options):
    with pytest.raises(RunError) as raised:
        evaluated(*arguments, **options)
    assert re.search(message, str(raised.value)) and "\n" not in str(raised.value), raised.value


def outputs(module, images):
    with torch.inference_mode():
        return module.eval()(torch.from_numpy(images).movedim(3, 1))
