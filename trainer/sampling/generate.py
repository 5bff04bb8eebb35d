"""Generate a class-balanced set of images from a network, over the ranks; noise depends on the sample's number."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from data.randomness import Purpose, draw, step_noise
from data.sets.form import ImageForm
from models.paths.registry import make_path
from models.sampling.generation import sample_images
from trainer.config.tree import Config
from trainer.ranks import Ranks
from trainer.sampling.networks import Networks


def generate(
    networks: Networks,
    config: Config,
    images: ImageForm,
    ranks: Ranks,
    progress: Callable[[int], object] = lambda number: None,
    classes: Sequence[int] | None = None,
) -> tuple[Tensor, int]:
    """Return (images (classes, sample.per_class, C, H, W), latents or pixels in [-1, 1], on the CPU, groups contiguous;
    number of evaluations). `classes`: which ones; None: all.

    Any number of ranks makes the same images. Groups are dealt to the ranks in equal numbers (repeating the last one if
    they do not divide), because a sharded network needs all ranks in every call. Each class is generated in whole
    groups, then cut to `per_class`. The network should hold the EMA weights; `images` gives shape and classes.
    """
    sample, shape = config.sample, images.shape
    size = sample.group_size
    per_class = -(-sample.per_class // size)  # in groups, from here on
    classes = range(images.num_classes) if classes is None else classes
    groups = (np.array(classes)[:, None] * per_class + np.arange(per_class)).ravel()
    per_rank = -(-len(groups) // ranks.world_size)
    mine = groups[np.minimum(np.arange(per_rank) + ranks.rank * per_rank, len(groups) - 1)]
    parts, evaluations = [], 0
    for chosen in np.array_split(mine, -(-per_rank // max(sample.batch // size, 1))):
        made, number = generate_groups(networks, config, shape, chosen, chosen // per_class, ranks.device)
        parts.append(made.cpu())
        evaluations = max(evaluations, number)
        progress(len(made))
    made = torch.cat(parts)
    if ranks.world_size > 1:
        gathered = torch.empty(ranks.world_size * len(made), *shape)
        dist.all_gather_into_tensor(gathered, made)
        made = gathered
    made = made[: len(groups) * size].view(len(classes), per_class * size, *shape)
    return made[:, : sample.per_class], evaluations


def generate_groups(
    networks: Networks,
    config: Config,
    shape: tuple[int, int, int],
    groups: np.ndarray,
    classes: np.ndarray,
    device: torch.device,
) -> tuple[Tensor, int]:
    """Return (images (b * size, C, H, W) on the device, number of evaluations) for the groups with numbers `groups`
    (b,) and classes (b,). An image's randomness depends only on its number: its group's, and its place in the group."""
    sample, size = config.sample, config.sample.group_size
    numbers = (groups[:, None] * size + np.arange(size)).ravel()
    drawn = draw(sample.seed, Purpose.SAMPLING, numbers, shape, size, config.model.slots)
    weights = np.array(sample.guidance, np.float32)[groups % len(sample.guidance)]
    arrays = (drawn.noise, classes.repeat(size), drawn.slot, weights.repeat(size))
    noise, label, slot, weight = (torch.from_numpy(array).to(device) for array in arrays)
    if len(set(sample.guidance)) == 1:
        weight = sample.guidance[0]

    def draw_step(step: int) -> Tensor:
        return torch.from_numpy(step_noise(sample.seed, numbers, shape, step)).to(device)

    return sample_images(networks, make_path(config.path), sample, noise, label, slot, weight, draw_step)
