"""Samples that are not finite are named: the first, the step, the weights."""

import numpy as np
import pytest
import torch

from data.sets.registry import open_images
from models.sampling.generation import Sampled
from trainer.config.tree import load_config
from trainer.ranks import Ranks, process_group
from trainer.sampling.finite import not_finite
from trainer.sampling.generate import generate, generate_groups
from trainer.sampling.networks import Networks

SHAPE, CPU = (1, 8, 8), torch.device("cpu")
GROUPS, CLASSES = np.array([4, 7, 9]), np.array([3, 0, 5])
SAMPLERS = ["euler", "heun", "pseudo_corrector", "sde", "ddim"]


def configured(tiny, *overrides):
    return load_config(tiny, ["run=unused", "groups.size=4", "sample.steps=10", "sample.guidance=1.5", *overrides])


def spoiling(time, chosen, value=torch.nan):
    """A network without groups, whose prediction of the images that `chosen(label)` picks is `value` after a time."""

    def network(x, t, label, slot, group_size):
        spoiled = (t >= time) & chosen(label)
        return torch.where(spoiled.view(-1, 1, 1, 1), value, x.sin())

    return network


def step_of(sampler, time):
    """The first step of 10, from 1, that has a prediction at a time from `time` on; path linear."""
    times = [*np.linspace(0, 0.96, 10), 1.0] if sampler == "sde" else np.linspace(0, 1, 11)
    reached = times[1:] if sampler in ("heun", "pseudo_corrector") else times[:-1]
    return 1 + int(np.argmax(np.array(reached) >= time))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("time", [0.0, 0.33, 0.85])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_the_step_and_the_image_are_told(tiny, sampler, time, value):
    """Of the images of class 0, which are the second group."""
    config = configured(tiny, f"sample.sampler={sampler}", "path=linear")
    networks = Networks(spoiling(time, lambda label: label == 0, value))
    made = generate_groups(networks, config, SHAPE, GROUPS, CLASSES, CPU)
    step = step_of(sampler, time)
    assert made.finite.tolist() == [10] * 4 + [step - 1] * 4 + [10] * 4
    wrong = not_finite(made, config.sample, "ema", first=100)
    assert wrong.startswith(f"weights=ema: image 104 is not finite after step {step} of 10; ") and "\n" not in wrong
    assert not_finite(Sampled(made.images[:4], 1, made.finite[:4]), config.sample, "ema") is None


def test_the_one_that_spoils_its_group_is_told_not_those_it_spoils(tiny):
    def network(x, t, label, slot, group_size):
        """Sees all images of its group, one of which fails."""
        mean = x.unflatten(0, (-1, group_size)).mean(dim=1).repeat_interleave(group_size, dim=0)
        failing = (torch.arange(len(x)) == 6) & (t >= 0.45) & (label >= 0)
        return torch.where(failing.view(-1, 1, 1, 1), torch.nan, (x + mean).sin())

    config = configured(tiny, "sample.sampler=euler", "path=linear")
    made = generate_groups(Networks(network), config, SHAPE, GROUPS, CLASSES, CPU)
    assert made.finite.tolist() == [10] * 4 + [6, 6, 5, 6] + [10] * 4
    assert "image 6 is not finite after step 6 of 10" in not_finite(made, config.sample, "ema")


@pytest.mark.parametrize("path", ["linear", "jit"])
@pytest.mark.parametrize("time", [0.0, 0.4])
def test_dopri5_whose_steps_are_of_all_images_names_the_one(tiny, path, time):
    config = configured(tiny, "sample.sampler=dopri5", f"path={path}", "sample.tolerance=1e-2")
    networks = Networks(spoiling(time, lambda label: label == 5))
    made = generate_groups(networks, config, SHAPE, GROUPS, CLASSES, CPU)
    assert made.images.isnan().all(), "nothing of the batch is kept"
    assert not_finite(made, config.sample, "ema").startswith("weights=ema: image 8 is not finite in dopri5; ")


def test_latents_that_are_finite_may_be_decoded_to_pixels_that_are_not(tiny):
    config, pixels = configured(tiny), torch.zeros(3, 2, *SHAPE)
    pixels[1, 1, 0, 3, 3] = torch.inf
    wrong = not_finite(Sampled(pixels, 20, torch.full((3, 2), 10)), config.sample, "ema")
    assert wrong.startswith("weights=ema: image 3 is not finite once decoded by data.vae; ")


def test_those_whose_batch_a_cut_image_ended_are_not_kept(tiny):
    """By dopri5, whose group is cut to the images that were finite."""
    config, lost = configured(tiny, "sample.sampler=dopri5"), torch.full((3, *SHAPE), torch.nan)
    wrong = not_finite(Sampled(lost, 20, torch.full((3,), 10)), config.sample, "ema")
    assert wrong.startswith("weights=ema: image 0 is not finite in dopri5; ")


def told_by_ranks(config, out):
    with process_group() as ranks:
        networks = Networks(spoiling(0.45, lambda label: label >= 7))
        made = generate(networks, config, open_images(config.data), ranks)
        (out / str(ranks.rank)).write_text(str(not_finite(made, config.sample, "ema")))


def test_all_ranks_know_it_and_call_the_network_as_often(tiny, ranks, tmp_path):
    config = configured(tiny, "sample.sampler=euler", "path=linear", "sample.per_class=3", "sample.batch=8")
    ranks.run(3, told_by_ranks, config, tmp_path)
    said = {(tmp_path / str(rank)).read_text() for rank in range(3)}
    assert len(said) == 1 and said.pop().startswith("weights=ema: image 21 is not finite after step 6 of 10; ")


def test_an_image_that_is_cut_away_does_not_matter(tiny):
    """A class has a group of 4, of which 3 are kept."""
    config = configured(tiny, "sample.sampler=euler", "path=linear", "sample.per_class=3", "sample.batch=4")

    def network(x, t, label, slot, group_size):
        return torch.where((torch.arange(4) == 3).view(-1, 1, 1, 1), torch.nan, x.sin())

    made = generate(Networks(network), config, open_images(config.data), Ranks(0, 1, CPU))
    assert not_finite(made, config.sample, "ema") is None
