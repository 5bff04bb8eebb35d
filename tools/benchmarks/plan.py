"""The group plan at ImageNet's size: seconds, memory, groups of true neighbours, and waiting that dealing saves."""

import resource
import statistics
import time

import numpy as np
import torch

from benchmarks import Figures, Targets
from benchmarks.group import step_seconds
from benchmarks.network import dit
from data.batches.loader import GroupSampler
from data.batches.plan import GroupsConfig, Plan, plan_epoch, steps_per_epoch
from data.neighbors.exact import NeighborGraph

IMAGES, CLASSES, NEIGHBORS, BATCH = 1_281_167, 1000, 32, 256


def measure() -> tuple[Figures, Targets]:
    """One epoch of light-4 and full-4 by similarity, each the median of three; then the waiting of ranks."""
    label = (np.arange(IMAGES) * CLASSES // IMAGES).astype(np.int64)
    before = _peak_gigabytes()
    graph = class_clusters(label, NEIGHBORS)
    figures: Figures = {"peak_gigabytes_of_the_graph": _peak_gigabytes() - before}
    for variant in ("light", "full"):
        config = _groups(variant)
        seconds = []
        for seed in range(3):
            start = time.perf_counter()
            plan = plan_epoch(config, label, graph, BATCH, seed, epoch=0)
            seconds.append(time.perf_counter() - start)
        figures[f"{variant}_seconds"] = statistics.median(seconds)
        figures[f"{variant}_true_neighbours"] = float(_truly_grouped(plan, graph, config.threshold))
    figures["peak_gigabytes"] = _peak_gigabytes()
    figures |= _waiting(label, graph)
    targets: Targets = {
        "light_seconds": ("<=", 0.5),
        "full_seconds": ("<=", 10.0),
        "full_true_neighbours": (">=", 0.96),
        "peak_gigabytes": ("<", 2.0),
    }
    targets |= {name: ("==", 0.0) for name in figures if name.startswith("waiting_ours")}
    return figures, targets


def _groups(variant: str) -> GroupsConfig:
    fields = {"variant": variant, "size": 4, "threshold": 0.3, "neighbors": NEIGHBORS}
    return GroupsConfig.model_validate(fields)


def class_clusters(label: np.ndarray, neighbors: int, width: int = 32) -> NeighborGraph:
    """The exact neighbours, within their class, of made-up features: a Gaussian cloud per class.

    Like real features these have hubs and images that are nobody's neighbour (in-degree 0 to about 250), which is what
    makes full grouping hard.
    """
    ids = np.empty((len(label), neighbors), np.int32)
    similarities = np.empty((len(label), neighbors), np.float32)
    rng = torch.Generator().manual_seed(0)
    for start, number in zip(*np.unique(label, return_index=True, return_counts=True)[1:], strict=True):
        features = torch.randn(int(number), width, generator=rng) + torch.randn(1, width, generator=rng)
        features = torch.nn.functional.normalize(features)
        cosine = (features @ features.T).fill_diagonal_(-2)
        values, order = cosine.topk(neighbors)
        ids[start : start + number] = order + int(start)
        similarities[start : start + number] = values
    return NeighborGraph(ids, similarities)


def _truly_grouped(plan: Plan, graph: NeighborGraph, threshold: float) -> float:
    """Share of the grouped images whose group is an anchor with neighbours at or above the threshold, checked anew."""
    in_group = np.arange(plan.images.shape[1]) < plan.grouped[:, None]
    groups = plan.images[in_group].reshape(-1, plan.group_size)
    anchors = graph.ids[groups[:, 0]]
    near = graph.similarities[groups[:, 0]] >= threshold
    true = [((anchors == member[:, None]) & near).any(axis=1) for member in groups[:, 1:].T]
    return np.all(true, axis=0).mean()


def _waiting(label: np.ndarray, graph: NeighborGraph) -> Figures:
    """Expected overhead of a step from ranks that wait for the slowest: light-4, 32 images a rank.

    The costs of a rank's 32 images, single or in groups, are those of `bench.py group`, measured here. Ours: from the
    micro-batches that the sampler deals to each rank. At random: each rank's batch is of groups with probability 0.1.
    """
    gpu = torch.cuda.is_available()
    network = dit("XL" if gpu else "S")
    seconds = step_seconds(network, 64 if gpu else 8, (1, 4), rounds=5)
    ratio = statistics.median(b / a for a, b in zip(seconds[1], seconds[4], strict=True))
    figures: Figures = {"cost_of_groups_of_4": ratio}
    cost = {False: 1.0, True: ratio}
    config = _groups("light")
    rng = np.random.default_rng(0)
    for world in (8, 64, 512):
        batch = 32 * world
        epoch = steps_per_epoch(IMAGES, batch)
        plan = plan_epoch(config, label, graph, batch, seed=0, epoch=0)
        ours = np.array(
            [
                [sum(cost[m.in_groups] * len(m.images) for m in step) for step in sampler]
                for rank in range(world)
                for sampler in [GroupSampler(lambda epoch, plan=plan: plan, epoch, 0, epoch, rank, world, None)]
            ]
        )
        random = np.where(rng.random((world, 20_000)) < (config.share or 0.0), ratio, 1.0)
        for name, costs in (("ours", ours), ("random", random)):
            slowest = costs.max(axis=0)
            figures[f"waiting_{name}_{world}_ranks"] = float((slowest - costs).mean() / costs.mean())
    return figures


def _peak_gigabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
