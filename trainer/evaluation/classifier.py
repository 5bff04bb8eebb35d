"""How good generated images are, by a small classifier of the real ones."""

import warnings
from collections.abc import Callable

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier

from data.sets.registry import ArrayImages
from trainer.errors import RunError
from trainer.evaluation.frechet import frechet_distance
from trainer.evaluation.metrics import NEIGHBOURS, kernel_distance, precision_and_recall
from trainer.sampling.pictures import to_uint8


def evaluate(generated: np.ndarray, label: np.ndarray, train: ArrayImages, heldout: ArrayImages) -> dict[str, float]:
    """`make_evaluator` for one set of images."""
    return make_evaluator(train, heldout)(generated, label)


def make_evaluator(train: ArrayImages, heldout: ArrayImages) -> Callable[[np.ndarray, np.ndarray], dict[str, float]]:
    """A function that gives measures of uint8 images (n, H, W, C) that were asked to be of class `label` (n,).

    In the last hidden layer of a classifier trained on `train`, beside the held-out images: frechet, the Frechet
    distance; kid, precision, recall as in trainer/evaluation/metrics.py. class_accuracy: the share of images that this
    classifier takes for the class asked for. Beside them, to compare with, the same of real images: frechet_train
    (training to held-out images) and heldout_accuracy. RunError if the images are not of the form of the real ones.
    """

    def pixels(images: ArrayImages) -> np.ndarray:
        return to_uint8(torch.from_numpy(images.x))

    classifier = _fit(pixels(train), train.label)
    reference = _features(classifier, pixels(heldout))
    real = {
        "frechet_train": frechet_distance(_features(classifier, pixels(train)), reference),
        "heldout_accuracy": float(np.mean(classifier.predict(_flat(pixels(heldout))) == heldout.label)),
    }
    form = (*heldout.shape[1:], heldout.shape[0])

    def measure(generated: np.ndarray, label: np.ndarray) -> dict[str, float]:
        if generated.dtype != np.uint8 or generated.shape[1:] != form or len(generated) <= NEIGHBOURS:
            size = ", ".join(map(str, form))
            raise RunError(f"images {generated.dtype} {generated.shape}: give uint8 (n, {size}), n > {NEIGHBOURS}")
        features = _features(classifier, generated)
        precision, recall = precision_and_recall(features, reference)
        return {
            "frechet": frechet_distance(features, reference),
            "kid": kernel_distance(features, reference),
            "precision": precision,
            "recall": recall,
            "class_accuracy": float(np.mean(classifier.predict(_flat(generated)) == label)),
            **real,
            "images": len(generated),
        }

    return measure


def _flat(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1) / 255.0


def _fit(images: np.ndarray, label: np.ndarray) -> MLPClassifier:
    """A classifier with hidden layers of 128 and 64 units; the same in every call."""
    classifier = MLPClassifier((128, 64), alpha=1e-3, max_iter=60, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a fixed number of passes is meant
        return classifier.fit(_flat(images), label)


def _features(classifier: MLPClassifier, images: np.ndarray) -> np.ndarray:
    """Activations of the last hidden layer (n, 64), which scikit-learn computes but does not offer."""
    hidden = _flat(images)
    for weights, bias in zip(classifier.coefs_[:-1], classifier.intercepts_[:-1], strict=True):
        hidden = np.maximum(hidden @ weights + bias, 0)
    return hidden
