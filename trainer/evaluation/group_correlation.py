"""How alike images of one group are, beyond their class: groups may make them repel each other, or copy each other."""

import numpy as np
import torch

from trainer.evaluation.accumulators import FEATURES
from trainer.evaluation.groups import GROUPS, Groups
from trainer.evaluation.metric import Metric, Side


def group_correlation(features: np.ndarray, groups: Groups) -> float:
    """Return the correlation of features (n, d) between images of one group, given their class: from -1/(size - 1) over
    0, as of images that were generated one by one, to 1, as of copies.

    With d_i = f_i - (mean of the class of i), for each class, averages of <d_i, d_j> over

        S: i = j,    I: pairs in one group,    O: pairs in different groups,

    and (I - O) / (S - O), numerator and denominator averaged over classes by their numbers of pairs in groups. `O`
    corrects for the mean being that of the class's own n images, which alone makes independent ones correlate by
    -1/(n - 1). In one class with groups of one size it is the intraclass correlation ICC(1) of an analysis of variance
    (Shrout and Fleiss, Psychological Bulletin 86, 1979), summed over features.

    Classes with less than two groups, or without a pair in one, are left out. Of features that never vary it is 0.
    """
    numerator = denominator = 0.0
    for one in np.unique(groups.label):
        rows = np.flatnonzero(groups.label == one)
        first = np.flatnonzero(np.diff(groups.group[rows], prepend=-1))
        size = np.diff(first, append=len(rows))
        inside, outside = int((size * (size - 1)).sum()), int(len(rows) ** 2 - (size**2).sum())
        if not inside or not outside:
            continue
        deviation = features[rows].astype(np.float64)
        deviation -= deviation.mean(axis=0)
        squares = float(np.square(deviation).sum())
        of_groups = float(np.square(np.add.reduceat(deviation, first)).sum())  # <d_i, d_j> over all i, j in one group
        other = -of_groups / outside  # all d_i of a class add up to 0
        numerator += of_groups - squares - inside * other
        denominator += inside * (squares / len(rows) - other)
    return numerator / denominator if denominator else 0.0


def _compute(generated: Side, real: Side, device: torch.device) -> float:
    (features,) = generated[FEATURES.name]
    return group_correlation(features, Groups(*generated[GROUPS]))


GROUP_CORRELATION = Metric(
    "group_correlation",
    needs=(FEATURES,),
    kinds=frozenset({"torchscript", "dinov2", "classifier"}),
    compute=_compute,
    of_real=(),
    grouped=True,
)
