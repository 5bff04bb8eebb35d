"""All metrics, by their names in `evaluate.metrics` and `--metrics`. A new metric is one file and one line here."""

from trainer.evaluation.frechet import FD_DINOV2, FID, FRECHET, SFID
from trainer.evaluation.group_correlation import GROUP_CORRELATION
from trainer.evaluation.inception_score import IS
from trainer.evaluation.kernel_distance import KID
from trainer.evaluation.metric import Metric
from trainer.evaluation.one_per_group import FD_DINOV2_ONE_PER_GROUP, FID_ONE_PER_GROUP
from trainer.evaluation.precision_recall import PRECISION, RECALL

METRICS: dict[str, Metric] = {
    "fid": FID,
    "fd_dinov2": FD_DINOV2,
    "sfid": SFID,
    "frechet": FRECHET,
    "is": IS,
    "kid": KID,
    "precision": PRECISION,
    "recall": RECALL,
    "fid_one_per_group": FID_ONE_PER_GROUP,
    "fd_dinov2_one_per_group": FD_DINOV2_ONE_PER_GROUP,
    "group_correlation": GROUP_CORRELATION,
}


def offered(kind: str, outputs: set[str], grouped: bool) -> list[str]:
    """Return the names of the metrics that a detector of this kind offers, given its outputs, of images that were
    generated in groups (`grouped`) or one by one."""
    return [
        name
        for name, metric in METRICS.items()
        if kind in metric.kinds
        and (grouped or not metric.grouped)
        and all(statistic.output in outputs for statistic in metric.needs)
    ]
