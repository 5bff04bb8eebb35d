"""Samples as pixels, and many of them as one picture."""

import numpy as np
import torch
from torch import Tensor

GRID_COLUMNS = 16
GRID_HEIGHT, GRID_IMAGE = 4096, 32  # pixels: the picture's at most, an image's at least


def to_uint8(images: Tensor) -> np.ndarray:
    """Convert images (..., C, H, W) in [-1, 1] to uint8 (..., H, W, C), as in image files and ADM's evaluator."""
    pixels = ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return pixels.movedim(-3, -1).numpy()


def classes_shown(number: int, height: int) -> range:
    """Return those of `number` classes, evenly spaced, for whose images (`height` pixels) `grid` has room."""
    rows = max(1, GRID_HEIGHT // max(height, GRID_IMAGE))
    return range(0, number, -(-number // rows))


def grid(images: np.ndarray, group_size: int) -> np.ndarray:
    """Arrange uint8 (classes, n, H, W, C) as one picture (height, width, C): a class per row, lines between images,
    white ones between groups; at most 16 columns, and small images enlarged."""
    images = images[:, :GRID_COLUMNS]
    classes, number, height, width, channels = images.shape
    enlarge = max(1, GRID_IMAGE // height)
    line, gap = 1, max(height // 4, 2)
    lefts = [i * (width + line) + i // group_size * gap for i in range(number)]
    canvas = np.full((classes * (height + line) - line, lefts[-1] + width, channels), 255, np.uint8)
    for row in range(classes):
        for left, image in zip(lefts, images[row], strict=True):
            canvas[row * (height + line) :, left:][:height, :width] = image
    return canvas.repeat(enlarge, axis=0).repeat(enlarge, axis=1)
