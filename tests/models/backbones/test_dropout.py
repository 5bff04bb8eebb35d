"""Dropout by hash: its masks are those of a fair coin, and belong to an image, a layer and a place alone."""

import math
import shutil

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from models.backbones.dropout import _scramble, dropped, image_keys, layer_keys
from models.backbones.jit import JiT
from tests.published_jit import published_jit

RATES = (0.1, 0.2, 0.5)
DEEP = {"depth": 8, "context_start": 2}


def keys_of(images, seed=0):
    return image_keys(torch.randn(images, 3, 6, 6, generator=torch.Generator().manual_seed(seed)))


def mask(keys, tokens, width, rate=0.2):
    return dropped(torch.ones(len(keys), tokens, width), rate, keys) == 0


def far(found, rate, number):
    """How many standard deviations a share of `number` coins is from the rate."""
    return abs(found - rate) / math.sqrt(rate * (1 - rate) / number)


@pytest.mark.parametrize("rate", RATES)
def test_so_many_are_dropped_in_each_image_and_the_others_scaled(rate):
    keys, x = keys_of(256), torch.randn(256, 40, 50)
    out = dropped(x, rate, keys)
    drop = out == 0
    assert torch.equal(out[~drop], x[~drop] * (1 / (1 - rate)))
    assert far(drop.float().mean().item(), rate, drop.numel()) < 5
    of_images = (drop.double().mean((1, 2)) - rate) / math.sqrt(rate * (1 - rate) / 2000)
    assert of_images.abs().max() < 5
    assert 0.8 < of_images.std() < 1.2  # as of independent coins
    assert not dropped(x, 1e-12, keys).isnan().any() and torch.equal(dropped(x, 0.0, keys), x)


def test_each_place_is_dropped_as_often_as_any_other():
    drop = mask(keys_of(20_000), 4, 15).double().mean(0)
    assert ((drop - 0.2) / math.sqrt(0.16 / 20_000)).abs().max() < 5


def test_images_layers_and_neighbours_drop_independently():
    keys = keys_of(200)
    first, second = (mask(part, 30, 40).double() - 0.2 for part in layer_keys(keys, 2))
    pairs = {
        "layers": (first, second),
        "images": (first[1:], first[:-1]),
        "columns": (first[..., 1:], first[..., :-1]),
        "tokens": (first[:, 1:], first[:, :-1]),
        "in the other layer": (first[:, 1:], second[:, :-1]),
        "the words of a key": (mask(keys, 30, 40).double() - 0.2, mask(keys.flip(1), 30, 40).double() - 0.2),
    }
    for name, (a, b) in pairs.items():
        assert abs((a * b).mean().item()) / 0.16 * math.sqrt(a.numel()) < 5, name


def test_images_that_differ_in_one_bit_drop_independently():
    noise = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    noise[1] = noise[0]
    noise[1, 0, 0, 5] = torch.nextafter(noise[0, 0, 0, 5], torch.tensor(9.0))
    one, other = mask(image_keys(noise), 100, 100).double() - 0.2
    assert abs((one * other).mean().item()) / 0.16 * 100 < 5
    swapped = noise[:1].clone()
    swapped[0, 0, 0, :2] = noise[0, 0, 0, :2].flip(0)
    assert not torch.equal(image_keys(swapped), image_keys(noise[:1]))


def test_a_key_is_its_images_and_no_others():
    noise = torch.randn(50_000, 4, 8, 2, generator=torch.Generator().manual_seed(3))
    keys = image_keys(noise)
    assert len(keys.unique(dim=0)) == len(keys)
    order = torch.randperm(len(noise))[:100]
    assert torch.equal(image_keys(noise[order]), keys[order])
    assert torch.equal(image_keys(noise.transpose(2, 3).contiguous().transpose(2, 3)), keys)  # of any layout
    x = torch.randn(100, 7, 9)
    out = dropped(x, 0.2, keys[order])
    for i in (0, 41, 99):
        assert torch.equal(dropped(x[i : i + 1], 0.2, keys[order[i : i + 1]]), out[i : i + 1])


def test_words_are_scrambled_as_in_exact_arithmetic():
    words = torch.randint(2**32, (5000,), generator=torch.Generator().manual_seed(0))
    words[:3] = torch.tensor([0, 2**32 - 1, 2**31])

    def exact(word):
        for shift, factor in ((16, 0x21F0AAAD), (15, 0xD35A2D97)):
            word = (word ^ (word >> shift)) * factor % 2**32
        return word ^ (word >> 15)

    assert _scramble(words).tolist() == [exact(word) for word in words.tolist()]
    assert len(_scramble(torch.arange(2**16)).unique()) == 2**16


@pytest.mark.parametrize("seed", range(3))
def test_without_keys_or_at_rate_0_nothing_changes(random_jit, random_inputs, seed):
    inputs = random_inputs(seed, 4, 2)
    never, sometimes = random_jit(seed, **DEEP), random_jit(seed, **DEEP, dropout=0.2)
    assert (never.takes_keys, sometimes.takes_keys) == (False, True)
    assert torch.equal(never(*inputs, 2), sometimes(*inputs, 2))
    assert torch.equal(never(*inputs, 2), never(*inputs, 2, None, keys_of(4)))
    assert (sometimes(*inputs, 2, None, keys_of(4)) - sometimes(*inputs, 2)).abs().flatten(1).amax(1).min() > 1e-3
    assert sometimes.state_dict().keys() == never.state_dict().keys()


@pytest.mark.parametrize(("depth", "dropping"), [(4, [1, 2]), (8, [2, 3, 4, 5]), (9, [2, 3, 4, 5]), (11, [2, 3, 4, 5])])
def test_the_middle_half_of_the_blocks_drops_where_the_published_code_does(random_jit, random_inputs, depth, dropping):
    """What attention gives, and what enters the MLP's last layer; in each place something else."""
    net, rate = random_jit(0, depth=depth, width=48, dropout=0.2, context_start=3), 0.2
    seen = {}
    for number, block in enumerate(net.blocks):
        block.attn.register_forward_hook(lambda _, args, out, number=number: seen.update({(number, "attn"): out}))
        block.mlp.w3.register_forward_pre_hook(lambda _, args, number=number: seen.update({(number, "mlp"): args[0]}))
    net(*random_inputs(0, 24, 2), 2, None, keys_of(24))
    masks = {place: values == 0 for place, values in seen.items()}
    assert {number for (number, _), drop in masks.items() if drop.any()} == set(dropping)
    for (number, _), drop in masks.items():
        if number in dropping:
            assert far(drop.float().mean().item(), rate, drop.numel()) < 5
    of_attention = [
        drop[:, -9:].flatten() for (number, part), drop in masks.items() if number in dropping if part == "attn"
    ]
    for i, one in enumerate(of_attention):
        for other in of_attention[:i]:
            assert far((one & other).float().mean().item(), rate**2, one.numel()) < 5


@pytest.mark.parametrize("group_size", [1, 2])
def test_it_is_the_published_network_with_its_masks(random_jit, random_inputs, group_size, monkeypatch):
    """nn.Dropout's law, given the masks: an independent implementation that multiplies by mask / (1 - rate)."""
    net, inputs, keys = random_jit(1, **DEEP, dropout=0.2), random_inputs(1, 4, group_size), keys_of(4)
    calls, linear = [], F.linear
    of_layers = layer_keys(keys, 2 * net.config.depth)

    def masked(x, weight, bias=None):
        """F.linear as `published_jit` calls it, image by image: finds its layer by the identity of the bias."""
        for number, block in enumerate(net.blocks):
            if not 2 <= number < 6 or bias is None:
                continue
            for part, layer in enumerate((block.attn.proj, block.mlp.w3)):
                if bias.shape == layer.bias.shape and torch.equal(bias, layer.bias.double()):
                    image = sum(call == (number, part) for call in calls)
                    calls.append((number, part))
                    shape = (1, x.shape[0], layer.out_features if part == 0 else layer.in_features)
                    keep = (dropped(torch.ones(shape), 0.2, of_layers[2 * number + part][image : image + 1]) != 0)[0]
                    if part == 0:
                        return linear(x, weight, bias) * keep / 0.8
                    return linear(x * keep / 0.8, weight, bias)
        return linear(x, weight, bias)

    out = net(*inputs, group_size, None, keys)
    monkeypatch.setattr(F, "linear", masked)
    weights = {name: value.detach().double() for name, value in net.named_parameters()}
    expected = published_jit(weights, net.config, *inputs, group_size)
    assert len(calls) == 4 * 2 * 4
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("group_size", [1, 2])
def test_an_image_has_its_masks_in_any_batch(random_jit, random_inputs, group_size):
    net, keys = random_jit(2, **DEEP, dropout=0.2), keys_of(8)
    inputs = random_inputs(2, 8, group_size)
    whole = net(*inputs, group_size, None, keys)
    order = torch.arange(8).view(-1, group_size).flip(0).flatten()
    moved = net(*(part[order] for part in inputs), group_size, None, keys[order])
    torch.testing.assert_close(moved, whole[order], rtol=0, atol=1e-5)
    parts = [net(*(part[i : i + 2] for part in inputs), group_size, None, keys[i : i + 2]) for i in range(0, 8, 2)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-5)


def gradients(net, inputs, keys):
    out = net(*inputs, 2, None, keys)
    return out, torch.autograd.grad(out.square().mean(), net.parameters())


def test_recomputed_blocks_drop_the_same(random_jit, random_inputs):
    net, inputs = random_jit(3, **DEEP, dropout=0.2), random_inputs(3, 4, 2)
    kept = gradients(net, inputs, keys_of(4))
    for block in net.blocks:
        inner = block.forward
        block.forward = lambda *args, inner=inner: checkpoint(
            inner, *args, use_reentrant=False, preserve_rng_state=False
        )
    torch.manual_seed(17)
    out, grads = gradients(net, inputs, keys_of(4))
    assert torch.equal(out, kept[0]) and all(torch.equal(a, b) for a, b in zip(grads, kept[1], strict=True))


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler: apt-get install g++")
def test_compiled_blocks_drop_the_same(random_jit, random_inputs):
    net, inputs = random_jit(4, depth=4, dropout=0.2), random_inputs(4, 4, 2)
    eager = gradients(net, inputs, keys_of(4))
    for block in net.blocks[1:2]:
        block.compile()
    torch.testing.assert_close(gradients(net, inputs, keys_of(4)), eager, rtol=1e-4, atol=1e-5)


def test_what_cannot_drop_is_said():
    for changes, said in (
        ({"depth": 3}, "dropout=0.2: depth=3 has no middle half"),
        ({"mlp": "gelu"}, "dropout=0.2: mlp=gelu has none; set mlp=swiglu"),
        ({"dropout": 1.0}, "less than 1"),
    ):
        with pytest.raises(ValueError, match=said):
            JiT.Config(**{"dropout": 0.2, "context_start": 1, **changes})
    assert nn.Dropout(0.2)(torch.ones(1000)).max() == dropped(torch.ones(1, 10, 100), 0.2, keys_of(1)).max()
