"""JiT as it is before training: its sizes, its multiply-adds, and what its weights start as."""

import pytest
import torch

from models.backbones.flops import forward_multiply_adds
from models.backbones.jit import JiT
from tests.models.initial import assert_xavier_uniform

PUBLISHED = pytest.mark.parametrize(  # tables 5 to 8 of the paper
    ("size", "patch", "side", "millions", "giga"),
    [
        ("B", 16, 256, 131, 25),
        ("L", 16, 256, 459, 88),
        ("H", 16, 256, 953, 182),
        ("B", 32, 512, 133, 26),
        ("L", 32, 512, 462, 89),
        ("H", 32, 512, 956, 183),
    ],
)


@PUBLISHED
def test_sizes_have_the_published_parameters_and_multiply_adds(size, patch, side, millions, giga):
    with torch.device("meta"):
        net = JiT(JiT.Config(size=size, patch=patch), 3, side, 1000)
    assert all(value.is_meta for value in (*net.parameters(), *net.buffers()))
    published = [p.numel() for name, p in net.named_parameters() if not name.startswith("sample_embedder")]
    assert round(sum(published) / 1e6) == millions
    assert round(forward_multiply_adds(net, 1, 3, side, 1) / 1e9) == giga


@pytest.mark.parametrize(("patch", "side", "giga"), [(16, 256, 383), (32, 512, 384)])
def test_size_g_has_its_two_billion_parameters(patch, side, giga):
    """Tables 7 and 8, which cut what we count as 383.7 and 384.9."""
    with torch.device("meta"):
        net = JiT(JiT.Config(size="G", patch=patch), 3, side, 1000)
    assert round(sum(p.numel() for p in net.parameters()) / 1e9) == 2
    assert int(forward_multiply_adds(net, 1, 3, side, 1) / 1e9) == giga


def test_sharing_attention_adds_exactly_its_products():
    config = JiT.Config(depth=3, width=24, heads=3, patch=2, context_tokens=5, context_start=1)
    with torch.device("meta"):
        net = JiT(config, 3, 8, 10)
    alone = forward_multiply_adds(net, 1, 3, 8, 1)
    for group_size in (2, 16):
        products = 2 * 24 * (group_size - 1) * (16**2 + 2 * (16 + 5) ** 2)
        assert forward_multiply_adds(net, group_size, 3, 8, group_size) == group_size * (alone + products)


@pytest.fixture(scope="module")
def fresh():
    torch.manual_seed(0)
    config = JiT.Config(depth=2, width=192, heads=3, patch=4, bottleneck=64, context_tokens=40, context_start=1)
    return JiT(config, 3, 16, 500, out_channels=6)


@pytest.mark.parametrize("group_size", [1, 4])
def test_a_fresh_network_outputs_zeros(fresh, group_size):
    x = torch.randn(4, 3, 16, 16)
    out = fresh(x, torch.rand(4), torch.tensor([0, 499, -1, 7]), torch.arange(4), group_size)
    assert out.shape == (4, 6, 16, 16)
    assert not out.any()


def test_a_fresh_network_is_gated_off_by_zeros_and_its_norms_are_ones(fresh):
    layers = [fresh.final_layer.linear, *(part.adaLN_modulation[1] for part in (*fresh.blocks, fresh.final_layer))]
    for layer in layers:
        assert not layer.weight.any()
    for name, value in fresh.named_parameters():
        assert not name.endswith("bias") or not value.any()
        assert "norm" not in name or (value == 1).all()
    assert fresh.x_embedder.proj1.bias is None


def test_embeddings_and_time_layers_start_normal_with_std_0_02(fresh):
    time = fresh.t_embedder.mlp
    tables = [part.weight for part in (fresh.y_embedder.embedding_table, fresh.sample_embedder.embedding_table)]
    for weight in (*tables, time[0].weight, time[2].weight, fresh.in_context_posemb):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert abs(weight.mean().item()) < 0.02 * 5 / weight.numel() ** 0.5
        assert weight.abs().max() > 0.05  # a uniform distribution of this std ends at 0.035


def test_other_layers_start_xavier_uniform(fresh):
    layers = [fresh.x_embedder.proj1, fresh.x_embedder.proj2]
    for block in fresh.blocks:
        layers += [block.attn.qkv, block.attn.proj, block.mlp.w12, block.mlp.w3]
    assert_xavier_uniform(layers)
