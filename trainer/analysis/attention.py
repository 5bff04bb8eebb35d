"""Attention between the images of a group, for a checkpoint: on noisy groups of its run's data, or while sampling."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from data.batches.batch import Batch, MicroBatch, make_batch
from data.batches.plan import form_groups
from data.batches.pool import Pool
from models.backbones.attention_mass import observing, token_attention
from models.objectives.denoising import denoising_loss
from models.paths.base import quantile_at
from models.paths.registry import make_path
from trainer.analysis.cross_attention import CrossAttention, keep_masses, mean_attention, watched
from trainer.build import open_data, shares_attention
from trainer.checkpoints.weights import WeightSource
from trainer.config.tree import Config
from trainer.errors import RunError
from trainer.sampling.decode import make_decoder
from trainer.sampling.generate import generate_groups
from trainer.sampling.networks import Loaded, Networks, load
from trainer.sampling.pictures import to_uint8

LEVELS = (-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0)  # log-SNR at which the attention of one group is shown


class Groups(NamedTuple):
    """Image numbers (groups, N) in `source`, and how many of the groups the query could not fill."""

    source: Pool
    numbers: np.ndarray
    fallbacks: int


class OneGroup(NamedTuple):
    """A group of N images, clean, and their attention. `mass` (levels, N, N) is P at log-SNRs `levels` (levels,),
    averaged over layers; `patch` (layers, N, cells, cells) is what one patch sends to each patch at the log-SNR
    `level`. NaN where groups share no attention."""

    pixels: np.ndarray
    label: np.ndarray
    levels: np.ndarray
    mass: np.ndarray
    level: float
    patch: np.ndarray


def load_grouped(source: WeightSource, config: Config) -> Loaded:
    """Load a network of a run with groups. Raise RunError if its run has none."""
    if config.groups.size < 2:
        raise RunError(f"groups.size={config.groups.size}: a run without groups; give one with groups of 2 or more")
    if config.model.group_layers == ():
        raise RunError("model.group_layers=[]: no layer of this run has groups; give one whose layers share attention")
    return load(source, config)


def draw_groups(config: Config, number: int) -> Groups:
    """Return at most `number` groups of a pool of the config's images, formed by its query."""
    pool = open_data(config).pool()
    number = min(number, len(pool.label) // config.groups.size)
    graph = pool.neighbors(config.groups.neighbors) if config.groups.query == "similarity" else None
    rng = np.random.default_rng([config.seed, 0])
    numbers, fallback = form_groups(config.groups, pool.label, graph, number, rng)
    return Groups(pool, numbers, int(fallback.sum()))


def data_attention(
    loaded: Loaded, groups: Groups, progress: Callable[[int], object] = lambda images: None
) -> CrossAttention:
    """Measure the attention in `groups` with noise, timesteps, slots and classes drawn as in training."""
    config, path, sums = loaded.config, make_path(loaded.config.path), []
    network = watched(loaded.networks.network, path, sums)
    numbers = np.arange(len(groups.numbers))
    for part in np.array_split(numbers, -(-len(numbers) // max(config.sample.batch // config.groups.size, 1))):
        batch = _batch(loaded, groups, part)
        with loaded.inference():
            denoising_loss(network, path, batch)
        progress(len(batch.x))
    return mean_attention(torch.stack(sums).sum(dim=0))


def sampling_attention(
    loaded: Loaded, number: int, progress: Callable[[int], object] = lambda images: None
) -> CrossAttention:
    """Measure `number` groups, of each class in turn, in all network calls while they are sampled by the config."""
    config, sums = loaded.config, []
    network, weaker, small = loaded.networks
    networks = Networks(watched(network, make_path(config.path), sums), weaker, small)
    numbers, size = np.arange(number), config.sample.group_size
    for part in np.array_split(numbers, -(-number // max(config.sample.batch // size, 1))):
        classes = part % loaded.images.num_classes
        with loaded.inference():
            generate_groups(networks, config, loaded.images.shape, part, classes, loaded.device)
        progress(len(part) * size)
    if not sums:
        raise RunError(
            f"sample.uncond_group_size={config.sample.uncond_group_size}: no image sees another while sampling; the run"
            " must be sampled with groups of 2 or more, and with guidance where they are the unconditional ones"
        )
    return mean_attention(torch.stack(sums).sum(dim=0))


def one_group(loaded: Loaded, groups: Groups, chosen: tuple[int, int, int, int], log_snr: float) -> OneGroup:
    """Measure the `chosen` (group, image in it, row and column of a patch) at about this log-SNR; P also at LEVELS."""
    config, path, network = loaded.config, make_path(loaded.config.path), loaded.networks.network
    size, cells = config.groups.size, loaded.images.shape[-1] // config.model.patch
    for name, value, limit in zip(
        ("group", "image", "row", "column"), chosen, (len(groups.numbers), size, cells, cells), strict=True
    ):
        if not 0 <= value < limit:
            raise RunError(f"patch: {name} {value} is not there; choose from 0 to {limit - 1}")
    assert isinstance(network, nn.Module)  # as `load` makes it
    group, image, row, column = chosen
    batch = _batch(loaded, groups, np.array([group]))
    masses: list[Tensor] = []
    maps: list[Tensor] = []

    def see_patch(layer: int, q: Tensor, k: Tensor) -> None:
        if len(q) == size:
            return maps.append(torch.full((size, cells, cells), torch.nan, device=q.device))
        tokens = q.shape[2] // size
        context = tokens - cells**2  # class tokens come before the patches
        token = image * tokens + context + row * cells + column
        maps.append(token_attention(q, k, size, token)[0, :, context:].unflatten(-1, (cells, cells)))

    def run(see: Callable[[int, Tensor, Tensor], None], wanted: float) -> float:
        share, level = quantile_at(path, wanted)
        with loaded.inference(), observing(network, see):
            denoising_loss(network, path, replace(batch, u=torch.full_like(batch.u, share), grouped=None))
        return level

    levels = [run(keep_masses(masses, size, size), level) for level in LEVELS]
    level = run(see_patch, log_snr)
    mass = torch.stack(masses).unflatten(0, (len(LEVELS), -1)).nanmean(dim=1)[:, 0]
    pixels = to_uint8(make_decoder(loaded.images.vae, loaded.images.shape[0], loaded.device)(batch.x.cpu()))
    arrays = (batch.label, torch.tensor(levels), mass, torch.stack(maps))
    label, levels, mass, patch = (array.cpu().numpy() for array in arrays)
    return OneGroup(pixels, label, levels, mass, level, patch)


def _batch(loaded: Loaded, groups: Groups, chosen: np.ndarray) -> Batch:
    """Return the `chosen` groups, one after another, as a batch on the device."""
    config = loaded.config
    numbers = groups.numbers[chosen].ravel()
    where = MicroBatch(int(chosen[0]) * config.groups.size, numbers, in_groups=True)
    settings = config.groups, config.model.slots, config.seed
    return make_batch(groups.source, *settings, where, shares_attention(config)).to(loaded.device)
