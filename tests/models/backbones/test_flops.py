import pytest
import torch

from models.backbones.dit import DiT
from models.backbones.flops import forward_multiply_adds


def network(size):
    with torch.device("meta"):
        return DiT(DiT.Config(size=size), 4, 32, 1000)


def test_xl_has_the_published_multiply_adds():
    assert forward_multiply_adds(network("XL"), 1, 4, 32, 1) == pytest.approx(118.64e9, rel=0.005)


@pytest.mark.parametrize("size", DiT.Config.sizes)
def test_sharing_attention_adds_exactly_its_products(size):
    net, tokens = network(size), 16 * 16
    depth, width = DiT.Config.sizes[size]["depth"], DiT.Config.sizes[size]["width"]
    alone = forward_multiply_adds(net, 1, 4, 32, 1)
    for group_size in (2, 4, 16):
        together = forward_multiply_adds(net, group_size, 4, 32, group_size)
        assert together == group_size * (alone + 2 * depth * tokens**2 * width * (group_size - 1))


@pytest.mark.parametrize(("images", "group_size"), [(3, 1), (8, 4), (12, 2)])
def test_multiply_adds_are_proportional_to_the_number_of_groups(images, group_size):
    net = DiT(DiT.Config(depth=2, width=24, heads=3), 3, 6, 5)
    one = forward_multiply_adds(net, group_size, 3, 6, group_size)
    assert forward_multiply_adds(net, images, 3, 6, group_size) * group_size == one * images


def test_counting_leaves_the_network_as_it_is():
    net = DiT(DiT.Config(depth=1, width=24, heads=3), 3, 6, 5)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    forward_multiply_adds(net, 2, 3, 6, 2)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
