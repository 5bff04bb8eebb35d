"""Verifiers: how well images show the classes they were generated for, group by group; built from classifiers. Samplers
use them to choose between candidates (best of n, search over noise, particles).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from data.sets.arrays import ArrayImages
from models.sampling.verifier import Verifier, sum_of_groups
from trainer.errors import RunError
from trainer.evaluation.classifier import class_log_probabilities, fit_classifier
from trainer.evaluation.detector import Detector
from trainer.sampling.pictures import to_uint8

Decode = Callable[[Tensor], Tensor]  # from the network's samples to pixels in [-1, 1]


def classifier_verifier(train: ArrayImages) -> Verifier:
    """Return a verifier based on the small classifier of trainer/evaluation/classifier.py, trained on these images."""
    classifier = fit_classifier(train)

    def log_probabilities(pixels: Tensor) -> Tensor:
        return torch.from_numpy(class_log_probabilities(classifier, to_uint8(pixels.cpu())))

    return _by_group(log_probabilities, lambda images: images)


def detector_verifier(
    detector: Detector, decode: Decode = lambda images: images, classes: Sequence[int] | None = None
) -> Verifier:
    """Return a verifier based on a detector's class probabilities; `classes[i]` is its class for label i (None: i).
    Calls raise RunError if it gives none."""

    def log_probabilities(pixels: Tensor) -> Tensor:
        outputs = detector(torch.from_numpy(to_uint8(pixels.cpu())).movedim(3, 1).to(pixels.device))
        if "probabilities" not in outputs:
            raise RunError(f"{detector.name}: gives no class probabilities; give one of the form of NVlabs's Inception")
        log = outputs["probabilities"].double().clamp(min=torch.finfo(torch.float32).tiny).log()
        return log if classes is None else log[:, list(classes)]

    return _by_group(log_probabilities, decode)


def _by_group(log_probabilities: Callable[[Tensor], Tensor], decode: Decode) -> Verifier:
    """Return a verifier that sums the log-probabilities of the labels over each group: their joint log-probability."""

    def verify(images: Tensor, label: Tensor, group_size: int) -> Tensor:
        found = log_probabilities(decode(images)).to(label.device)
        return sum_of_groups(found.gather(1, label.long()[:, None])[:, 0], group_size)

    return verify
