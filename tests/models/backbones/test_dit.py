import math

import pytest
import torch
from torch.nn import functional as F

from models.backbones.dit import DiT
from models.backbones.embeddings import sincos_positions
from tests.models.initial import assert_xavier_uniform

SEEDS = range(3)
GROUPS = pytest.mark.parametrize(("group_size", "groups"), [(2, 3), (4, 2), (8, 1)])


def published_dit(net, heads, x, t, label, slot):
    """Peebles & Xie's DiT (github.com/facebookresearch/DiT, models.py) image by image, from the weights of `net`."""
    w = dict(net.named_parameters())
    channels, patch = net.out_channels, net.config.patch

    def linear(name, value):
        return F.linear(value, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(value, shift, scale):
        return F.layer_norm(value, value.shape[-1:], eps=1e-6) * (1 + scale) + shift

    def one(x, t, label, slot):
        kernel = w["x_embedder.proj.weight"].view(-1, channels, patch, patch)
        tokens = F.conv2d(x[None], kernel, w["x_embedder.proj.bias"], stride=patch).flatten(2).transpose(1, 2)[0]
        width, side = tokens.shape[1], x.shape[1] // patch
        tokens = tokens + sincos_positions(width, side)
        freqs = torch.exp(-math.log(10000) * torch.arange(0, 128, dtype=torch.float32) / 128)
        args = t * net.config.time_scale * freqs
        embedding = torch.cat([torch.cos(args), torch.sin(args)])
        c = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", embedding)))
        c = c + w["y_embedder.embedding_table.weight"][label] + w["sample_embedder.embedding_table.weight"][slot]
        for i in range(len(net.blocks)):
            shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = linear(
                f"blocks.{i}.adaLN_modulation.1", F.silu(c)
            ).chunk(6)
            qkv = linear(f"blocks.{i}.attn.qkv", norm(tokens, shift_msa, scale_msa))
            q, k, v = qkv.reshape(-1, 3, heads, width // heads).permute(1, 2, 0, 3)
            attn = (q @ k.transpose(-2, -1) * (width // heads) ** -0.5).softmax(dim=-1)
            out = linear(f"blocks.{i}.attn.proj", (attn @ v).transpose(0, 1).reshape(-1, width))
            tokens = tokens + gate_msa * out
            hidden = F.gelu(linear(f"blocks.{i}.mlp.fc1", norm(tokens, shift_mlp, scale_mlp)), approximate="tanh")
            tokens = tokens + gate_mlp * linear(f"blocks.{i}.mlp.fc2", hidden)
        shift, scale = linear("final_layer.adaLN_modulation.1", F.silu(c)).chunk(2)
        patches = linear("final_layer.linear", norm(tokens, shift, scale))
        patches = patches.reshape(side, side, patch, patch, channels)
        return torch.einsum("hwpqc->chpwq", patches).reshape(channels, side * patch, side * patch)

    return torch.stack([one(*image) for image in zip(x, t, label, slot, strict=True)])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("changes", [{}, {"patch": 3, "time_scale": 1000}, {"patch": 1, "mlp_ratio": 2.5, "heads": 1}])
def test_images_alone_go_through_the_published_dit(random_dit, random_inputs, seed, changes):
    net, inputs = random_dit(seed, **changes), random_inputs(seed, 5, 1)
    torch.testing.assert_close(net(*inputs), published_dit(net, changes.get("heads", 3), *inputs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
@GROUPS
def test_a_block_diagonal_mask_makes_the_images_of_a_group_independent(
    random_dit, random_inputs, separate_images, seed, group_size, groups
):
    net, inputs = random_dit(seed), random_inputs(seed, groups * group_size, group_size)
    alone = net(*inputs, 1)
    assert (net(*inputs, group_size) - alone).abs().flatten(1).amax(dim=1).min() > 1e-3  # without it, all differ
    separate_images(tokens=9)
    torch.testing.assert_close(net(*inputs, group_size), alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
@GROUPS
def test_permuting_the_images_of_a_group_permutes_outputs_and_gradients(
    random_dit, random_inputs, shuffled_groups, seed, group_size, groups
):
    images = groups * group_size
    net = random_dit(seed)
    order = shuffled_groups(seed, images, group_size)
    x, t, label, slot = random_inputs(seed, images, group_size)
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))

    def run(order):
        ordered_x, ordered_t = x[order].requires_grad_(), t[order].requires_grad_()
        out = net(ordered_x, ordered_t, label[order], slot[order], group_size)
        leaves = [ordered_x, ordered_t, *net.parameters()]
        return out, *torch.autograd.grad((out * weight[order]).mean(), leaves)

    out, grad_x, grad_t, *grads = run(torch.arange(images))
    moved_out, moved_grad_x, moved_grad_t, *moved_grads = run(order)
    torch.testing.assert_close(moved_out, out[order], rtol=0, atol=1e-5)
    torch.testing.assert_close(moved_grad_x, grad_x[order], rtol=0, atol=1e-5)
    torch.testing.assert_close(moved_grad_t, grad_t[order], rtol=0, atol=1e-5)
    torch.testing.assert_close(moved_grads, grads, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("size", "millions"), [("S", 33), ("B", 130), ("L", 458), ("XL", 675)])
def test_sizes_have_the_published_number_of_parameters(size, millions):
    with torch.device("meta"):
        net = DiT(DiT.Config(size=size), 4, 32, 1000)
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(millions * 1e6, rel=0.01)


def test_a_plain_network_has_the_parameters_of_the_published_one_to_the_last():
    """675,129,632 of DiT-XL/2 (github.com/facebookresearch/DiT), which counts its fixed positions."""
    with torch.device("meta"):
        net = DiT(DiT.Config(size="XL", max_group_size=0), 4, 32, 1000, out_channels=8)
    assert sum(p.numel() for p in net.parameters()) + net.pos_embed.numel() == 675_129_632


@pytest.fixture(scope="module")
def fresh():
    torch.manual_seed(0)
    return DiT(DiT.Config(depth=2, width=192, heads=3), 4, 16, 500)


@pytest.mark.parametrize("group_size", [1, 4])
def test_a_fresh_network_outputs_zeros(fresh, group_size):
    x = torch.randn(4, 4, 16, 16)
    out = fresh(x, torch.rand(4), torch.tensor([0, 499, -1, 7]), torch.arange(4), group_size)
    assert out.shape == x.shape
    assert not out.any()


def test_a_fresh_network_is_gated_off_by_zeros(fresh):
    layers = [fresh.final_layer.linear, *(part.adaLN_modulation[1] for part in (*fresh.blocks, fresh.final_layer))]
    for layer in layers:
        assert not layer.weight.any()
    assert not any(p.any() for name, p in fresh.named_parameters() if name.endswith("bias"))


def test_embeddings_and_time_layers_start_normal_with_std_0_02(fresh):
    time = fresh.t_embedder.mlp
    for table in (fresh.y_embedder.embedding_table, fresh.sample_embedder.embedding_table, time[0], time[2]):
        assert table.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert abs(table.weight.mean().item()) < 0.02 * 5 / table.weight.numel() ** 0.5
        assert table.weight.abs().max() > 0.05  # a uniform distribution of this std ends at 0.035


def test_other_layers_start_xavier_uniform(fresh):
    layers = [fresh.x_embedder.proj]
    for block in fresh.blocks:
        layers += [block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2]
    assert_xavier_uniform(layers)


@pytest.mark.parametrize("size", DiT.Config.sizes)
def test_size_fills_depth_width_and_heads(size):
    config = DiT.Config(size=size)
    assert {name: getattr(config, name) for name in DiT.Config.sizes[size]} == DiT.Config.sizes[size]
    assert DiT.Config(**config.model_dump()) == config
    assert DiT.Config(depth=config.depth, width=config.width, heads=config.heads).size is None


@pytest.mark.parametrize("field", ["depth", "width", "heads"])
def test_a_value_that_contradicts_the_size_is_an_error(field):
    with pytest.raises(ValueError, match=f"{field}=1000: contradicts size=B"):
        DiT.Config(size="B", **{field: 1000})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": "XXL"}, "size=XXL"),
        ({"width": 30, "heads": 4}, "width=30"),
        ({"width": 30, "heads": 3}, "width=30"),
        ({"depth": 0}, "depth"),
        ({"layers": 3}, "layers"),
    ],
)
def test_an_impossible_network_is_an_error_that_names_the_field(values, message):
    with pytest.raises(ValueError, match=message):
        DiT.Config(**values)


def test_a_patch_that_does_not_divide_the_side_is_an_error():
    with pytest.raises(ValueError, match="patch=2: must divide the image side 7"):
        DiT(DiT.Config(depth=1, width=8, heads=1, patch=2), 1, 7, 2)
