"""Generate a class-balanced set of images from a network, over the ranks; noise depends on the sample's number."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from data.randomness import Purpose, call_slots, draw, step_noise
from data.sets.form import ImageForm
from models.paths.registry import make_path
from models.sampling.generation import Sampled, sample_images
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
) -> Sampled:
    """Return images (classes, sample.per_class, C, H, W), latents or pixels in [-1, 1], on the CPU, groups contiguous.
    They may not be finite: see `trainer.sampling.finite`. `classes`: which ones; None: all.

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
    parts: list[Sampled] = []
    for chosen in np.array_split(mine, -(-per_rank // max(sample.batch // size, 1))):
        made = generate_groups(networks, config, shape, chosen, chosen // per_class, ranks.device)
        parts.append(made._replace(images=made.images.cpu(), finite=made.finite.cpu()))
        progress(len(made.images))

    def by_class(tensors: Iterable[Tensor]) -> Tensor:
        everyone = _gathered(torch.cat(tuple(tensors)), ranks)[: len(groups) * size]
        return everyone.unflatten(0, (len(classes), per_class * size))[:, : sample.per_class]

    images_of, evaluations, finite_of = zip(*parts, strict=True)
    return Sampled(by_class(images_of), max(evaluations), by_class(finite_of))


def _gathered(own: Tensor, ranks: Ranks) -> Tensor:
    """Return the rows of all ranks."""
    if ranks.world_size == 1:
        return own
    everyone = own.new_empty(ranks.world_size * len(own), *own.shape[1:])
    dist.all_gather_into_tensor(everyone, own)
    return everyone


def generate_groups(
    networks: Networks,
    config: Config,
    shape: tuple[int, int, int],
    groups: np.ndarray,
    classes: np.ndarray,
    device: torch.device,
) -> Sampled:
    """Return images (b * size, C, H, W) on the device for the groups with numbers `groups` (b,) and classes (b,). An
    image's randomness depends only on its number: its group's, and its place in the group. They may not be finite: see
    `trainer.sampling.finite`."""
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

    def redraw(evaluation: int, prediction: int) -> Tensor:
        call = 2 * evaluation + prediction
        rows = call_slots(sample.seed, groups, size, config.model.slots, call)
        return torch.from_numpy(rows).to(device)

    slots = redraw if sample.slots == "redrawn" else slot
    return sample_images(networks, make_path(config.path), sample, noise, label, slots, weight, draw_step)
