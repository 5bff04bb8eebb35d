"""The group plan: which images each step of an epoch has, alone or in groups.

It is made for the global batch, does not depend on the world size, and is a pure function of (seed, epoch): all ranks
make the same one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, Field, model_validator

from data.batches.groups import class_groups, similar_groups
from data.batches.pool import Pool
from data.neighbors.exact import NeighborGraph

Level = Annotated[float, Field(ge=-np.inf)]  # not NaN
SHARES = {"none": 0.0, "light": 0.1, "full": 1.0}


class GroupsConfig(BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True):
    """Groups of Group Diffusion (arXiv 2512.10954).

    none: plain diffusion. light (C=1, UC=N): a `share` of the images in unconditional groups, the others alone with
    their class. full (C=N, UC=N): groups with their class; the class is dropped for a whole group.
    """

    variant: Literal["none", "light", "full"] = "light"
    """none: plain diffusion; light: some images in groups without their class; full: groups that keep their class."""
    size: int = Field(4, ge=1, le=16)
    """Images in a group, N."""
    share: float | None = Field(None, ge=0, le=1)
    """Share of the images that are in groups. null: 0, 0.1 or 1 for variant none, light or full."""
    drop: float = Field(0.1, ge=0, le=1)
    """Of variant none and full: probability that a class is dropped."""
    query: Literal["similarity", "class", "random"] = "similarity"
    """What the images of a group have in common: similar features, the class, or nothing."""
    threshold: float = Field(0.7, ge=-1, le=1)
    """Of query=similarity: least cosine similarity between a group's anchor and each member."""
    neighbors: int = Field(32, ge=1)
    """Of query=similarity: most similar images that are candidates for the group of an image; at least size - 1."""
    mixing: Literal["by_step", "within_step"] = "by_step"
    """by_step: a step holds only groups or only single images; within_step: it holds both."""
    splits: int = Field(8, ge=1)
    """Of mixing=within_step: world sizes that divide this number can train the run."""
    spread: float = Field(0.0, ge=0, le=1)
    """How far timesteps in a group may lie from its first image's, as quantiles. 0: all the same; 1: independent."""
    window: tuple[Level | None, Level | None] | None = None
    """Lowest and highest log-SNR at which groups share attention; null at either end: no limit there. null: always."""

    @model_validator(mode="before")
    @classmethod
    def _fill_share(cls, values: dict) -> dict:
        if isinstance(values, dict) and values.get("share") is None:
            return {**values, "share": SHARES.get(str(values.get("variant", "light")))}
        return values

    @model_validator(mode="after")
    def _check(self) -> "GroupsConfig":
        if self.variant == "none" and (self.size != 1 or self.share != 0):
            name, value, fix = ("size", self.size, 1) if self.size != 1 else ("share", self.share, 0)
            raise ValueError(f"{name}={value}: variant=none has no groups; set {name}={fix}, or variant=light")
        if self.variant != "none" and self.share == 0:
            raise ValueError(f"share={self.share}: variant={self.variant} needs groups; set share above 0")
        if self.query == "similarity" and self.size > self.neighbors + 1:
            raise ValueError(f"neighbors={self.neighbors}: must be at least size - 1 = {self.size - 1}")
        low, high = self.window or (None, None)
        if low is not None and high is not None and low > high:
            raise ValueError(f"window={[low, high]}: lowest log-SNR first")
        return self


def needs_neighbors(config: GroupsConfig) -> bool:
    """Return whether groups are formed from a neighbor graph."""
    return config.variant != "none" and config.query == "similarity"


@dataclass(frozen=True)
class Plan:
    """One epoch. Row i of `images` (steps, global batch) int32 is a step; its first `grouped[i]` images are contiguous
    groups of `group_size`, and the others are single. `fallback` (number of groups,) bool marks, in the order of the
    groups, those that the query could not fill: they hold leftover images, of one class where possible."""

    images: np.ndarray
    grouped: np.ndarray
    group_size: int
    fallback: np.ndarray


def make_planner(config: GroupsConfig, images: Pool, global_batch: int, seed: int) -> Callable[[int], Plan]:
    """Return a function from the number of an epoch to its plan. It caches the last plan."""
    graph = images.neighbors(config.neighbors) if needs_neighbors(config) else None
    return lru_cache(maxsize=1)(lambda epoch: plan_epoch(config, images.label, graph, global_batch, seed, epoch))


def plan_epoch(
    config: GroupsConfig,
    label: np.ndarray,
    graph: NeighborGraph | None,
    global_batch: int,
    seed: int,
    epoch: int,
) -> Plan:
    """Return the plan of one epoch over images with `label` (n,). Only the similarity query needs `graph`.

    No image appears twice; n modulo the global batch images are left out, different ones in each epoch.
    """
    n = len(label)
    steps = steps_per_epoch(n, global_batch)
    rng = np.random.default_rng([seed, epoch])
    grouped = np.diff(grouped_before(config, global_batch, epoch * steps + np.arange(steps + 1)))
    groups, fallback = form_groups(config, label, graph, int(grouped.sum()) // config.size, rng)
    alone = np.ones(n, dtype=bool)
    alone[groups] = False
    images = np.empty((steps, global_batch), np.int32)
    in_group = np.arange(global_batch) < grouped[:, None]
    images[in_group] = groups.ravel()
    images[~in_group] = rng.permutation(np.flatnonzero(alone).astype(np.int32))[: images.size - groups.size]
    return Plan(images, grouped, config.size, fallback)


def steps_per_epoch(images: int, global_batch: int) -> int:
    """Return the number of steps in an epoch, the same for every epoch, so that a position of the run determines its
    epoch and step."""
    if images < global_batch:
        raise ValueError(f"train.global_batch={global_batch}: must not exceed the number of images, {images}")
    return images // global_batch


def group_quantum(config: GroupsConfig, global_batch: int) -> int:
    """Return the number of images that the group part of a step is a multiple of."""
    return global_batch if config.mixing == "by_step" else config.size * config.splits


def grouped_before(config: GroupsConfig, global_batch: int, step: int | np.ndarray) -> np.ndarray:
    """Return the number of images in groups in all steps before `step`: the share of all images so far, to within one
    quantum (a line drawn on a grid: multiples of the share, rounded down)."""
    quantum = group_quantum(config, global_batch)
    slope = (config.share or 0.0) * global_batch / quantum
    return np.floor(step * slope + 1e-9).astype(np.int64) * quantum  # rounding may put a whole number just below


def form_groups(
    config: GroupsConfig, label: np.ndarray, graph: NeighborGraph | None, count: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return `count` disjoint groups (count, size) in random order, and which of them are fallbacks, (count,) bool."""
    if count == 0:
        return np.empty((0, config.size), np.int32), np.empty(0, dtype=bool)
    everyone = np.arange(len(label), dtype=np.int32)
    if config.query == "random":
        groups = rng.permutation(everyone)[: count * config.size].reshape(count, config.size)
        return groups, np.zeros(count, dtype=bool)
    if config.query == "class":
        groups, answered = class_groups(label, everyone, config.size, rng)
    else:
        assert graph is not None, "the similarity query needs a graph"
        groups = similar_groups(graph, config.threshold, config.size, count, rng)
        answered = len(groups)
        if answered < count:
            alone = np.ones(len(label), dtype=bool)
            alone[groups] = False
            left_over, _ = class_groups(label, everyone[alone], config.size, rng)
            groups = np.concatenate([groups, left_over])
    order = rng.permutation(count)
    return groups[:count][order], order >= answered
