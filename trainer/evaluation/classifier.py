"""Metrics of generated images in the features of a small classifier trained on real ones."""

import warnings
from collections.abc import Callable

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier

from data.sets.arrays import ArrayImages
from trainer.errors import RunError
from trainer.evaluation.accumulators import FEATURES, MOMENTS
from trainer.evaluation.frechet import frechet_distance
from trainer.evaluation.groups import GROUPS, make_groups
from trainer.evaluation.metric import Arrays
from trainer.evaluation.metrics import METRICS, offered
from trainer.evaluation.precision_recall import NEIGHBOURS
from trainer.sampling.pictures import to_uint8

CPU = torch.device("cpu")


def evaluate(generated: np.ndarray, label: np.ndarray, train: ArrayImages, heldout: ArrayImages) -> dict[str, float]:
    """Call `make_evaluator` for one set of images."""
    return make_evaluator(train, heldout)(generated, label)


def make_evaluator(train: ArrayImages, heldout: ArrayImages) -> Callable[..., dict[str, float]]:
    """Return a function that takes uint8 images (n, H, W, C), generated for the classes `label` (n,) in groups of
    `group_size` (default: 1), and returns metrics.

    They are all METRICS of the kind "classifier" (frechet, kid, precision, recall; of groups, group_correlation),
    compared with the held-out images in the last hidden layer of a classifier trained on `train`; and class_accuracy:
    the share of images that the classifier assigns to their class. Beside them, for comparison, the same of real
    images: frechet_train (training to held-out images) and heldout_accuracy. Raise RunError if the images do not have
    the form of the real ones.
    """
    classifier = fit_classifier(train)
    seen = to_uint8(torch.from_numpy(heldout.x))
    reference = _features(classifier, seen)
    real = {
        "frechet_train": frechet_distance(_features(classifier, to_uint8(torch.from_numpy(train.x))), reference),
        "heldout_accuracy": float(np.mean(classifier.predict(_flat(seen)) == heldout.label)),
    }
    form = (*heldout.shape[1:], heldout.shape[0])
    theirs = _side(reference)

    def evaluate(generated: np.ndarray, label: np.ndarray, group_size: int = 1) -> dict[str, float]:
        if generated.dtype != np.uint8 or generated.shape[1:] != form or len(generated) <= NEIGHBOURS:
            size = ", ".join(map(str, form))
            raise RunError(f"images {generated.dtype} {generated.shape}: give uint8 (n, {size}), n > {NEIGHBOURS}")
        groups = make_groups(label, group_size)
        ours = _side(_features(classifier, generated)) | ({GROUPS: groups} if groups else {})
        names = offered("classifier", {"features"}, groups is not None)
        return {
            **{name: METRICS[name].compute(ours, theirs, CPU) for name in names},
            "class_accuracy": float(np.mean(classifier.predict(_flat(generated)) == label)),
            **real,
            "images": len(generated),
        }

    return evaluate


def fit_classifier(train: ArrayImages) -> MLPClassifier:
    """Return a classifier of uint8 images divided by 255 and flattened, with hidden layers of 128 and 64 units, trained
    on real images; every call gives the same one."""
    classifier = MLPClassifier((128, 64), alpha=1e-3, max_iter=60, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the number of passes is fixed on purpose
        return classifier.fit(_flat(to_uint8(torch.from_numpy(train.x))), train.label)


def class_log_probabilities(classifier: MLPClassifier, images: np.ndarray) -> np.ndarray:
    """Return the log-probabilities (n, classes) of the classes of uint8 images (n, H, W, C)."""
    return classifier.predict_log_proba(_flat(images))


def _side(features: np.ndarray) -> dict[str, Arrays]:
    moments = features.mean(axis=0), np.cov(features, rowvar=False)
    return {MOMENTS.name: moments, FEATURES.name: (features,)}


def _flat(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1) / 255.0


def _features(classifier: MLPClassifier, images: np.ndarray) -> np.ndarray:
    """Return the activations of the last hidden layer (n, 64), which scikit-learn computes but does not expose."""
    hidden = _flat(images)
    for weights, bias in zip(classifier.coefs_[:-1], classifier.intercepts_[:-1], strict=True):
        hidden = np.maximum(hidden @ weights + bias, 0)
    return hidden
