"""From a config to the plan and the network, and whether the config fits its data."""

from collections.abc import Callable
from functools import lru_cache

import torch

from data.images import Images
from data.neighbors import nearest_neighbors
from data.plan import Plan, plan_epoch
from models.dit import DiT
from trainer.config import Config
from trainer.errors import RunError


def check_data(config: Config, images: Images) -> None:
    """RunError if the images are too few or of a size that does not fit."""
    n, side = len(images), images.x.shape[-1]
    if config.train.global_batch > n:
        raise RunError(f"train.global_batch={config.train.global_batch}: more than there are images; set {n} or less")
    if _needs_graph(config) and config.groups.neighbors >= n:
        raise RunError(f"groups.neighbors={config.groups.neighbors}: an image has {n - 1} others; set that or less")
    if side % config.model.patch:
        raise RunError(f"model.patch={config.model.patch}: must divide the side of the images, {side}")


def make_planner(config: Config, images: Images) -> Callable[[int], Plan]:
    """The plan of an epoch as a function of its number; the last one is remembered."""
    graph = nearest_neighbors(images.features, config.groups.neighbors) if _needs_graph(config) else None
    return lru_cache(maxsize=1)(
        lambda epoch: plan_epoch(config.groups, images.label, graph, config.train.global_batch, config.seed, epoch)
    )


def build_network(config: Config, images: Images) -> DiT:
    """The network for these images, initialised by the run's seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return DiT(config.model, images.x.shape[1], images.x.shape[2], images.num_classes)


def _needs_graph(config: Config) -> bool:
    return config.groups.variant != "none" and config.groups.query == "similarity"
