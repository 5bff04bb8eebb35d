"""What holds for every backbone."""

import warnings

import pytest
import torch
from torch import nn

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


@pytest.mark.parametrize("seed", SEEDS)
def test_autocast_is_near_fp32_and_does_not_mind_layers_that_are_stored_in_bf16(random_network, random_inputs, seed):
    """As FSDP's policy stores them."""
    net, inputs = random_network(seed), random_inputs(seed, 4, 2)
    exact = net(*inputs, 2)
    with warnings.catch_warnings(), torch.autocast("cpu", torch.bfloat16):
        warnings.simplefilter("error")
        cast = net(*inputs, 2)
        for layer in (module for module in net.blocks.modules() if isinstance(module, nn.Linear)):
            layer.bfloat16()
        assert torch.equal(net(*inputs, 2), cast)
    assert cast.dtype == torch.float32
    assert 0 < (cast - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("seed", SEEDS)
def test_under_autocast_tokens_are_not_rounded(random_network, random_inputs, seed):
    """A block that adds nothing, its gates being zero, returns tokens that bf16 could not hold, to the last bit."""
    net, inputs = random_network(seed), random_inputs(seed, 4, 2)
    last = net.blocks[-1]
    nn.init.zeros_(last.adaLN_modulation[1].weight)
    nn.init.zeros_(last.adaLN_modulation[1].bias)
    passed = []
    last.register_forward_hook(lambda block, inputs, output: passed.append((inputs[0], output)))
    with torch.autocast("cpu", torch.bfloat16):
        net(*inputs, 2)
    [(before, after)] = passed
    assert torch.equal(before, after) and not torch.equal(before, before.bfloat16().float())
