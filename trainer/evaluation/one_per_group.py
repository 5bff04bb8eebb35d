"""Frechet distances of one image of each group: of images that are independent, as plain ones are.

Images of a group repel each other, so n of them cover a class more evenly than n independent ones, and the part of a
distance that is due to n being finite differs. Compare this one with that of as many plain samples.
"""

import numpy as np
import torch

from trainer.evaluation.accumulators import FEATURES, MOMENTS
from trainer.evaluation.frechet import frechet, warn_if_few
from trainer.evaluation.groups import GROUPS, Groups
from trainer.evaluation.metric import Metric, Side


def first_of_groups(features: np.ndarray, groups: Groups) -> np.ndarray:
    """Return the features (groups, d) of the first image of each group."""
    return features[np.flatnonzero(np.diff(groups.group, prepend=-1))]


def _compute(generated: Side, real: Side, device: torch.device) -> float:
    (features,) = generated[FEATURES.name]
    chosen = first_of_groups(features, Groups(*generated[GROUPS])).astype(np.float64)
    warn_if_few(*chosen.shape)
    return frechet(chosen.mean(axis=0), np.cov(chosen, rowvar=False), *real[MOMENTS.name])


FID_ONE_PER_GROUP, FD_DINOV2_ONE_PER_GROUP = (
    Metric(name, needs=(FEATURES,), kinds=frozenset({kind}), compute=_compute, of_real=(MOMENTS,), grouped=True)
    for name, kind in (("fid_one_per_group", "torchscript"), ("fd_dinov2_one_per_group", "dinov2"))
)
