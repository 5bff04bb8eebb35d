"""All metrics, by their names in `evaluate.metrics` and `--metrics`. A new metric is one file and one line here."""

from trainer.evaluation.frechet import FD_DINOV2, FID, FRECHET, SFID
from trainer.evaluation.inception_score import IS
from trainer.evaluation.kernel_distance import KID
from trainer.evaluation.metric import Metric
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
}


def offered(kind: str, outputs: set[str]) -> list[str]:
    """Return the names of the metrics that a detector of this kind offers, given its outputs."""
    return [
        name
        for name, metric in METRICS.items()
        if kind in metric.kinds and all(statistic.output in outputs for statistic in metric.needs)
    ]
