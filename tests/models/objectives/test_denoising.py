from dataclasses import dataclass, replace

import pytest
import torch

from models.backbones.embeddings import NULL_LABEL
from models.objectives.denoising import denoising_loss
from models.paths.registry import PATHS, LinearFlow, make_path, path_config

SEEDS = range(4)


@dataclass
class Images:
    x: torch.Tensor
    noise: torch.Tensor
    u: torch.Tensor
    label: torch.Tensor
    slot: torch.Tensor
    conditional: torch.Tensor
    group_size: int
    grouped: int | None = None
    position: int = 0


def batch(random_inputs, seed, images=6, group_size=3):
    x, t, _, slot = random_inputs(seed, images, group_size)
    generator = torch.Generator().manual_seed(3000 + seed)
    noise = torch.randn(x.shape, generator=generator)
    label = torch.randint(5, (images,), generator=generator)
    return Images(x, noise, t, label, slot, torch.rand(images, generator=generator) < 0.5, group_size)


def test_the_loss_of_a_tiny_network_is_the_one_found_by_hand():
    """One pixel. Image 0: x 3, noise 1, t 0.25: x_t 1.5, target 2; image 1: x -1, noise 1, t 0.5: x_t 0, target -2."""
    pixels = [torch.tensor(values).view(2, 1, 1, 1) for values in ([3.0, -1.0], [1.0, 1.0])]
    label = torch.tensor([4, 2])
    images = Images(*pixels, torch.tensor([0.25, 0.5]), label, torch.tensor([0, 7]), torch.tensor([True, False]), 1)

    def network(x, t, label, slot, group_size, grouped):
        return x + (10 * label + 100 * slot).view(-1, 1, 1, 1) + t.view(-1, 1, 1, 1)

    # predictions 1.5 + 40 + 0 + 0.25 = 41.75 and 0 - 10 + 700 + 0.5 = 690.5
    loss = denoising_loss(network, LinearFlow(), images)
    assert loss.tolist() == [(41.75 - 2) ** 2, (690.5 + 2) ** 2]
    assert label.tolist() == [4, 2]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_network_that_knows_the_answer_has_no_loss_and_one_that_says_zero_that_of_the_target(random_inputs, seed):
    images = batch(random_inputs, seed)
    target = images.x - images.noise
    assert not denoising_loss(lambda *_: target, LinearFlow(), images).any()
    silent = denoising_loss(lambda x, *_: torch.zeros_like(x), LinearFlow(), images)
    torch.testing.assert_close(silent, torch.stack([image.square().mean() for image in target]))


@pytest.mark.parametrize("seed", SEEDS)
def test_the_network_gets_noisy_images_and_null_labels_where_unconditional(random_inputs, seed):
    images = batch(random_inputs, seed)
    inputs = []
    denoising_loss(lambda *args: inputs.extend(args) or args[0], LinearFlow(), images)
    x, t, label, slot, group_size, grouped = inputs
    for i in range(6):
        torch.testing.assert_close(x[i], images.u[i] * images.x[i] + (1 - images.u[i]) * images.noise[i])
    assert torch.equal(t, images.u)
    assert torch.equal(slot, images.slot)
    assert label.tolist() == [
        number if conditional else NULL_LABEL
        for number, conditional in zip(images.label.tolist(), images.conditional.tolist(), strict=True)
    ]
    assert (group_size, grouped) == (3, None)
    denoising_loss(lambda *args: inputs.extend(args) or args[0], LinearFlow(), replace(images, grouped=3))
    assert inputs[-1] == 3


@pytest.mark.parametrize("seed", SEEDS)
def test_the_loss_of_groups_is_per_image_and_each_groups_own(random_dit, random_inputs, seed):
    net, images = random_dit(seed), batch(random_inputs, seed)
    loss = denoising_loss(net, LinearFlow(), images)
    assert loss.shape == (6,)
    for group in (slice(0, 3), slice(3, 6)):
        parts = {name: value[group] for name, value in vars(images).items() if isinstance(value, torch.Tensor)}
        torch.testing.assert_close(denoising_loss(net, LinearFlow(), replace(images, **parts)), loss[group])
    alone = denoising_loss(net, LinearFlow(), replace(images, group_size=1))
    assert (alone - loss).abs().min() > 0  # the group matters


def test_the_loss_is_in_fp32_whatever_the_network_computes_in(random_inputs):
    images = batch(random_inputs, 0)
    loss = denoising_loss(lambda x, *_: x.bfloat16(), LinearFlow(), images)
    assert loss.dtype == torch.float32
    x_t = images.u.view(-1, 1, 1, 1) * images.x + (1 - images.u.view(-1, 1, 1, 1)) * images.noise
    expected = (x_t.bfloat16().double() - (images.x - images.noise).double()).square().flatten(1).mean(dim=1)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", PATHS)
def test_the_network_and_the_loss_have_the_paths_own_timesteps(random_inputs, name):
    """The batch's u are quantiles of their distribution."""
    images, path, inputs = batch(random_inputs, 0), make_path(path_config({"name": name})), []

    def network(x, t, *others):
        inputs.extend((x, t))
        return torch.cat([x, x], dim=1).sin() if name == "ddpm" else x.sin()

    loss = denoising_loss(network, path, images)
    x_t, t = inputs
    assert torch.equal(t, path.timestep(images.u))
    assert torch.equal(x_t, path.noisy(images.x, images.noise, t))
    assert torch.equal(loss, path.loss(network(x_t, t), images.x, images.noise, x_t, t))
