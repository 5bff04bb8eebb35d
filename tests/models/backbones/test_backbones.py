"""What holds for every backbone."""

import pytest
import torch

SEEDS = range(3)


@pytest.fixture(params=["dit", "jit"])
def random_network(request):
    """A small network with random weights, made from a seed."""
    return request.getfixturevalue(f"random_{request.param}")


@pytest.mark.parametrize("seed", SEEDS)
def test_an_image_feels_all_images_of_its_group_and_no_other(random_network, random_inputs, seed):
    net = random_network(seed)
    x, t, label, slot = random_inputs(seed, 6, 3)
    x.requires_grad_()
    for image in range(6):
        (grad,) = torch.autograd.grad(net(x, t, label, slot, 3)[image].square().mean(), x)
        felt = grad.flatten(1).abs().amax(dim=1)
        same_group = torch.arange(6) // 3 == image // 3
        assert (felt[same_group] > 1e-6).all()
        assert (felt[~same_group] == 0).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_label_slot_and_time_each_matter(random_network, random_inputs, seed):
    net = random_network(seed)
    x, t, label, slot = random_inputs(seed, 4, 1)
    out = net(x, t, label, slot)
    for other in ((x, 1 - t, label, slot), (x, t, (label + 2) % 5, slot), (x, t, label, (slot + 1) % 8)):
        assert (net(*other) - out).abs().flatten(1).amax(dim=1).min() > 1e-3
