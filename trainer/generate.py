"""A class-balanced set of images from a network, over the ranks; noise belongs to the number of the sample."""

from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from data.images import Images
from data.randomness import Stream, draw
from models.generation import sample_images
from models.paths import PATHS
from trainer.config import Config
from trainer.ranks import Ranks


def generate(
    network: Callable[..., Tensor],
    config: Config,
    images: Images,
    ranks: Ranks,
    progress: Callable[[int], object] = lambda number: None,
) -> Tensor:
    """Images (classes, sample.per_class, C, H, W), latents or in [-1, 1], on the CPU, the groups of a class contiguous.

    Any number of ranks makes the same images. Groups are dealt to the ranks in equal numbers (the last one again, where
    they do not divide), because a sharded network needs all ranks in every call. A class has whole groups, cut to
    `per_class`. `network` should hold the EMA weights; `images` tells shape and classes.
    """
    sample, shape = config.sample, images.shape
    size = sample.group_size
    per_class = -(-sample.per_class // size)  # in groups, from here on
    groups = images.num_classes * per_class
    per_rank = -(-groups // ranks.world_size)
    mine = np.minimum(np.arange(per_rank) + ranks.rank * per_rank, groups - 1)
    parts = []
    for chosen in np.array_split(mine, -(-per_rank // max(sample.batch // size, 1))):
        numbers = (chosen[:, None] * size + np.arange(size)).ravel()
        drawn = draw(sample.seed, Stream.SAMPLING, numbers, shape, size, config.model.max_group_size)
        label = numbers // (per_class * size)
        inputs = (torch.from_numpy(array).to(ranks.device) for array in (drawn.noise, label, drawn.slot))
        parts.append(sample_images(network, PATHS[config.path](), sample, *inputs))
        progress(len(label))
    made = torch.cat(parts)
    if ranks.world_size > 1:
        gathered = torch.empty(ranks.world_size * len(made), *shape, device=made.device)
        dist.all_gather_into_tensor(gathered, made)
        made = gathered
    made = made[: groups * size].view(images.num_classes, per_class * size, *shape)
    return made[:, : sample.per_class].cpu()


def to_uint8(images: Tensor) -> np.ndarray:
    """Images (..., C, H, W) in [-1, 1] -> uint8 (..., H, W, C), as image files and ADM's evaluator have them."""
    pixels = ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return pixels.movedim(-3, -1).numpy()


def grid(images: np.ndarray, group_size: int, enlarge: int = 1) -> np.ndarray:
    """uint8 (classes, n, H, W, C) -> one picture (height, width, C): a class per row, lines between images, and white
    between groups."""
    classes, number, height, width, channels = images.shape
    line, gap = 1, max(height // 4, 2)
    lefts = [i * (width + line) + i // group_size * gap for i in range(number)]
    canvas = np.full((classes * (height + line) - line, lefts[-1] + width, channels), 255, np.uint8)
    for row in range(classes):
        for left, image in zip(lefts, images[row], strict=True):
            canvas[row * (height + line) :, left:][:height, :width] = image
    return canvas.repeat(enlarge, axis=0).repeat(enlarge, axis=1)
