"""Verifiers know real digits and their classes, and value groups as a whole."""

import numpy as np
import pytest
import torch
from torch import nn

from data.sets.registry import DataConfig, open_images
from tests.trainer import detectors
from trainer.errors import RunError
from trainer.evaluation.detector import load_detector
from trainer.evaluation.verifiers import classifier_verifier, detector_verifier

GROUP = 4


class Brightness(nn.Module):
    """A detector in NVlabs's form of two classes: dark and bright."""

    def __init__(self) -> None:
        super().__init__()
        self.output = nn.Linear(1, 2)
        self.output.weight.data = torch.tensor([[-8.0], [8.0]])

    def forward(self, img: torch.Tensor, return_features: bool = False, no_output_bias: bool = False) -> torch.Tensor:
        features = img.float().mean(dim=[1, 2, 3])[:, None] / 127.5 - 1
        return features if return_features else nn.functional.linear(features, self.output.weight).softmax(dim=1)


@pytest.fixture(scope="module")
def heldout():
    images = open_images(DataConfig(), "heldout")
    return torch.from_numpy(images.x), torch.from_numpy(images.label)


@pytest.fixture(scope="module")
def verify():
    return classifier_verifier(open_images(DataConfig()))


def test_real_digits_are_worth_more_than_shuffled_labels_and_noise(verify, heldout):
    images, label = (part[: len(heldout[1]) // GROUP * GROUP] for part in heldout)
    real = verify(images, label, GROUP)
    shuffled = verify(images, label[torch.randperm(len(label), generator=torch.Generator().manual_seed(0))], GROUP)
    assert real.shape == (len(images) // GROUP,)
    assert (real > shuffled).double().mean() > 0.95 and real.mean() > shuffled.mean() + 5
    assert verify(images, (label + 1) % 10, GROUP).max() < real.median()
    noise = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, images.shape).astype(np.float32))
    assert verify(noise, label, GROUP).mean() < real.mean()


def test_a_group_is_worth_the_sum_of_its_images_and_changes_with_one_of_them(verify, heldout):
    images, label = heldout[0][:24], heldout[1][:24].clone()
    groups, alone = verify(images, label, GROUP), verify(images, label, 1)
    torch.testing.assert_close(groups, alone.view(-1, GROUP).sum(dim=1))
    label[5] = (label[5] + 1) % 10
    changed = verify(images, label, GROUP) != groups
    assert changed.tolist() == [number == 5 // GROUP for number in range(24 // GROUP)]


def test_a_detector_with_probabilities_verifies_what_is_decoded(tmp_path):
    detector = load_detector(str(detectors.save(Brightness(), tmp_path / "brightness.pt")), torch.device("cpu"))
    latents = torch.tensor([-0.4, -0.3, 0.4, 0.3]).view(4, 1, 1, 1).expand(4, 1, 8, 8)
    verify = detector_verifier(detector, decode=lambda latents: 2 * latents)
    right, wrong = torch.tensor([0, 0, 1, 1]), torch.tensor([1, 1, 0, 0])
    assert (verify(latents, right, 2) > verify(latents, wrong, 2)).all()
    swapped = detector_verifier(detector, decode=lambda latents: 2 * latents, classes=[1, 0])
    torch.testing.assert_close(swapped(latents, wrong, 2), verify(latents, right, 2))


def test_a_detector_without_probabilities_is_refused(tmp_path):
    detector = load_detector(str(detectors.save(detectors.Plain(6), tmp_path / "plain.pt")), torch.device("cpu"))
    with pytest.raises(RunError, match=r"plain.pt: gives no class probabilities; give one of the form of"):
        detector_verifier(detector)(torch.zeros(2, 3, 8, 8), torch.zeros(2), 1)
