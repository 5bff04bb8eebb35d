import shutil

import pytest
import torch
from torch import nn

from models.backbones.jit import JiT, RMSNorm, RotaryAttention, rotate, rotations
from tests.published_jit import published_jit, turned

SEEDS = range(3)
GROUPS = pytest.mark.parametrize(("seed", "group_size", "groups"), [(0, 2, 3), (1, 4, 2), (2, 8, 1)])
CONTEXTS = pytest.mark.parametrize("changes", [{}, {"context_tokens": 0}, {"context_start": 0}, {"context_start": 2}])


@pytest.mark.parametrize(("seed", "group_size"), list(enumerate([1, 2, 3, 6])))
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"patch": 3, "time_scale": 10.0, "group_layers": (0, 2)},
        {"context_tokens": 0, "heads": 2, "group_layers": ()},
        {"context_start": 0, "mlp_ratio": 2.5, "patch": 1, "heads": 6},
    ],
)
def test_images_and_groups_go_through_the_published_jit(random_jit, random_inputs, seed, group_size, changes):
    net, inputs = random_jit(seed, **changes), random_inputs(seed, 6, group_size)
    weights = {name: value.detach().double() for name, value in net.named_parameters()}
    expected = published_jit(weights, net.config, *inputs, group_size)
    torch.testing.assert_close(net(*inputs, group_size).double(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("changes", "tokens"), [({"context_tokens": 0}, 9), ({"context_start": 0}, 9 + 4)])
@GROUPS
def test_a_block_diagonal_mask_makes_the_images_of_a_group_independent(
    random_jit, random_inputs, separate_images, seed, changes, tokens, group_size, groups
):
    net, inputs = random_jit(seed, **changes), random_inputs(seed, groups * group_size, group_size)
    alone = net(*inputs, 1)
    assert (net(*inputs, group_size) - alone).abs().flatten(1).amax(dim=1).min() > 1e-3  # without it, all differ
    separate_images(tokens)
    torch.testing.assert_close(net(*inputs, group_size), alone, rtol=0, atol=1e-5)


@CONTEXTS
@GROUPS
def test_permuting_the_images_of_a_group_permutes_outputs_and_gradients(
    random_jit, random_inputs, shuffled_groups, seed, changes, group_size, groups
):
    images = groups * group_size
    net = random_jit(seed, **changes)
    order = shuffled_groups(seed, images, group_size)
    x, t, label, slot = random_inputs(seed, images, group_size)
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))

    def run(order):
        ordered_x = x[order].requires_grad_()
        out = net(ordered_x, t[order], label[order], slot[order], group_size)
        return out, *torch.autograd.grad((out * weight[order]).mean(), [ordered_x, *net.parameters()])

    out, grad_x, *grads = run(torch.arange(images))
    moved_out, moved_grad_x, *moved_grads = run(order)
    torch.testing.assert_close(moved_out, out[order], rtol=0, atol=2e-5)
    torch.testing.assert_close(moved_grad_x, grad_x[order], rtol=0, atol=2e-5)
    torch.testing.assert_close(moved_grads, grads, rtol=0, atol=2e-5)


@pytest.mark.parametrize("seed", SEEDS)
@CONTEXTS
def test_a_group_of_one_image_many_times_is_that_image_alone(random_jit, random_inputs, seed, changes):
    """Only where positions restart in each image do its copies look alike from everywhere."""
    net = random_jit(seed, **changes)
    alone = random_inputs(seed, 2, 1)
    copies = [value.repeat_interleave(4, dim=0) for value in alone]
    expected = net(*alone).repeat_interleave(4, dim=0)
    torch.testing.assert_close(net(*copies, 4), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("grouped", [0, 2, 4, 6])
def test_only_the_leading_images_share(random_jit, random_inputs, seed, grouped):
    net = random_jit(seed)
    inputs = random_inputs(seed, 6, 2)
    together, alone = net(*inputs, 2), net(*inputs, 1)
    assert (together - alone).abs().flatten(1).amax(dim=1).min() > 1e-3
    expected = torch.cat([together[:grouped], alone[grouped:]])
    torch.testing.assert_close(net(*inputs, 2, grouped), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_groups_share_in_the_chosen_layers_only(random_jit, random_inputs, seed):
    inputs = random_inputs(seed, 4, 4)
    nowhere, first, everywhere = (random_jit(seed, group_layers=layers) for layers in ((), (0,), None))
    alone = everywhere(*inputs, 1)
    assert torch.equal(nowhere(*inputs, 4), alone)
    for other in (alone, everywhere(*inputs, 4)):
        assert (first(*inputs, 4) - other).abs().amax() > 1e-3


@pytest.mark.parametrize("seed", SEEDS)
def test_the_scale_of_queries_and_keys_does_not_matter(random_jit, random_inputs, seed):
    net, inputs = random_jit(seed), random_inputs(seed, 4, 2)
    out = net(*inputs, 2)

    def scale(part, factor):
        for block in net.blocks:
            for value in (block.attn.qkv.weight, block.attn.qkv.bias):
                value.data.chunk(3)[part].mul_(factor)

    scale(0, 7)
    scale(1, 1 / 3)
    torch.testing.assert_close(net(*inputs, 2), out, rtol=0, atol=5e-5)
    scale(2, 3)
    assert (net(*inputs, 2) - out).abs().max() > 1e-2


@pytest.mark.parametrize("seed", SEEDS)
def test_attention_of_rotated_tokens_depends_on_their_distance_alone(seed):
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 1, 9, 2, 16, generator=generator)
    everywhere = rotations(16, 11).unflatten(1, (11, 11))

    def logits(q_at, k_at):
        windows = (everywhere[:, row : row + 3, column : column + 3].flatten(1, 2) for row, column in (q_at, k_at))
        return torch.einsum("bqhd,bkhd->bhqk", *(rotate(x, at) for x, at in zip((q, k), windows, strict=True)))

    here = logits((0, 0), (0, 0))
    far = logits((0, 0), (2, 5))
    for shift in ((1, 0), (0, 1), (3, 2)):
        torch.testing.assert_close(logits(shift, shift), here, rtol=0, atol=1e-4)
        torch.testing.assert_close(logits(shift, (2 + shift[0], 5 + shift[1])), far, rtol=0, atol=1e-4)
        assert (logits((0, 0), shift) - here).abs().max() > 1e-2


def test_context_tokens_are_not_rotated():
    table = rotations(8, 3, context=4)
    x = torch.randn(2, 4 + 9, 3, 8, generator=torch.Generator().manual_seed(0))
    out = rotate(x, table)
    assert torch.equal(out[:, :4], x[:, :4])
    assert torch.equal(out[:, 4:], rotate(x[:, 4:], rotations(8, 3)))
    torch.testing.assert_close(out[:, 4:].unflatten(1, (3, 3))[0].double(), turned(x[0, 4:].double().view(3, 3, 3, 8)))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("start", [0, 1, 2])
def test_the_class_speaks_through_its_tokens_from_their_block_on(random_jit, random_inputs, seed, start):
    net = random_jit(seed, context_start=start)
    for part in (*net.blocks, net.final_layer):
        part.adaLN_modulation[1].weight.data.zero_()  # adaLN no longer hears the class
    x, t, label, slot = random_inputs(seed, 4, 1)

    def run(label):
        seen = []
        hooks = [block.register_forward_hook(lambda *call: seen.append(call[2])) for block in net.blocks]
        out = net(x, t, label, slot)
        for hook in hooks:
            hook.remove()
        return seen, out

    (seen, out), (other_seen, other_out) = run(label), run((label + 2) % 5)
    for i, (one, other) in enumerate(zip(seen, other_seen, strict=True)):
        assert one.shape[1] == (9 + 4 if i >= start else 9)
        assert torch.equal(one, other) == (i < start)
    assert (out - other_out).abs().flatten(1).amax(dim=1).min() > 1e-3


@pytest.mark.parametrize("seed", SEEDS)
@CONTEXTS
def test_every_parameter_has_a_gradient(random_jit, random_inputs, seed, changes):
    net = random_jit(seed, **changes)
    out = net(*random_inputs(seed, 8, 4), 4)
    grads = torch.autograd.grad(out.square().mean(), net.parameters())
    for (name, _), grad in zip(net.named_parameters(), grads, strict=True):
        assert grad.abs().max() > 1e-6, name


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler: apt-get install g++")
def test_compiled_blocks_have_the_outputs_and_gradients_of_eager_ones(random_jit, random_inputs):
    net, inputs = random_jit(0, depth=1, context_start=0), random_inputs(0, 4, 2)

    def run():
        out = net(*inputs, 2)
        return out, torch.autograd.grad(out.square().mean(), net.parameters())

    eager = run()
    for block in net.blocks:
        block.compile()
    torch.testing.assert_close(run(), eager, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"context_tokens": 0}])
def test_each_matrix_product_reads_contiguous_numbers(random_jit, random_inputs, changes):
    """Where one does not, compiled gradients have come out wrong."""
    net, strides = random_jit(0, **changes), []
    layers = [module for module in net.modules() if isinstance(module, nn.Linear)]
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, args: strides.append(args[0].is_contiguous()))
    net(*random_inputs(0, 4, 2), 2)
    assert strides == len(layers) * [True]


@pytest.mark.parametrize("width", [8, 256])
@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)],
)
def test_the_norm_is_computed_in_fp32(width, dtype, weight_dtype):
    norm = RMSNorm(width).to(weight_dtype)
    nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(0))
    x = (1000 * torch.randn(5, 7, width, generator=torch.Generator().manual_seed(1))).to(dtype)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight.double()
    out = norm(x)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), exact, rtol=2**-8 if dtype == torch.bfloat16 else 1e-6, atol=1e-7)


@pytest.mark.parametrize("context_tokens", [0, 4])
def test_checkpoints_hold_the_published_names_and_no_positions(random_jit, context_tokens):
    linear = [f"blocks.{i}.{part}" for i in range(3) for part in ("attn.qkv", "attn.proj", "mlp.w12", "mlp.w3")]
    linear += [f"{part}.adaLN_modulation.1" for part in ("blocks.0", "blocks.1", "blocks.2", "final_layer")]
    linear += ["x_embedder.proj2", "t_embedder.mlp.0", "t_embedder.mlp.2", "final_layer.linear"]
    norms = [f"blocks.{i}.{part}" for i in range(3) for part in ("norm1", "norm2", "attn.q_norm", "attn.k_norm")]
    weights = [*linear, *norms, "final_layer.norm_final", "x_embedder.proj1"]
    weights += ["y_embedder.embedding_table", "sample_embedder.embedding_table"]
    expected = {f"{name}.weight" for name in weights} | {f"{name}.bias" for name in linear}
    expected |= {"in_context_posemb"} if context_tokens else set()
    assert set(random_jit(0, context_tokens=context_tokens).state_dict()) == expected


def test_a_batch_that_is_not_whole_groups_is_refused():
    with pytest.raises((RuntimeError, ValueError)):
        RotaryAttention(24, 3, rotations(8, 3))(torch.randn(5, 9, 24), 2)


def test_a_patch_that_does_not_divide_the_side_is_an_error():
    with pytest.raises(ValueError, match=r"^model\.patch=4: must divide the image side 14$"):
        JiT(JiT.Config(depth=1, width=8, heads=1, patch=4, context_start=0), 1, 14, 2)
