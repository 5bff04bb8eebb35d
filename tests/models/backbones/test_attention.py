import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from models.backbones.attention import GroupAttention

SEEDS = range(4)
WIDTH, HEADS, TOKENS = 24, 3, 5
CASES = pytest.mark.parametrize(("group_size", "groups"), [(1, 4), (2, 3), (3, 2), (8, 2)])


def attend(attn, x):
    """Plain self-attention of a DiT (timm's), head by head in float64, of one sequence x (tokens, width)."""
    attn, x = copy.deepcopy(attn).double(), x.double()
    q, k, v = (x @ w.T + b for w, b in zip(attn.qkv.weight.chunk(3), attn.qkv.bias.chunk(3), strict=True))
    heads = []
    for rows in torch.arange(WIDTH).chunk(HEADS):
        score = q[:, rows] @ k[:, rows].T / len(rows) ** 0.5
        heads.append(score.softmax(dim=1) @ v[:, rows])
    return torch.cat(heads, dim=1) @ attn.proj.weight.T + attn.proj.bias


@pytest.fixture(params=SEEDS)
def attn(request, random_weights):
    return random_weights(GroupAttention(WIDTH, HEADS), request.param)


def tokens(images, seed=0):
    return torch.randn(images, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))


def test_groups_of_one_are_plain_attention(attn):
    x = tokens(4)
    out = attn(x, 1)
    torch.testing.assert_close(attn(x), out, rtol=0, atol=0)
    plain = torch.stack([attend(attn, image) for image in x])
    torch.testing.assert_close(out.double(), plain, rtol=0, atol=1e-5)


@CASES
def test_a_group_is_plain_attention_over_one_long_sequence(attn, group_size, groups):
    x = tokens(groups * group_size)
    out = attn(x, group_size)
    for group in range(groups):
        own = slice(group * group_size, (group + 1) * group_size)
        expected = attend(attn, torch.cat(list(x[own])))
        torch.testing.assert_close(torch.cat(list(out[own])).double(), expected, rtol=0, atol=1e-5)


@CASES
def test_a_block_diagonal_mask_makes_images_independent(attn, separate_images, group_size, groups):
    x = tokens(groups * group_size)
    alone = attn(x, 1)
    separate_images(TOKENS)
    torch.testing.assert_close(attn(x, group_size), alone, rtol=0, atol=1e-5)


@CASES
def test_permuting_the_images_of_a_group_permutes_outputs_and_gradients(attn, shuffled_groups, group_size, groups):
    images = groups * group_size
    order = shuffled_groups(0, images, group_size)
    weight = tokens(images, seed=1)

    def run(x, weight):
        x = x.clone().requires_grad_()
        out = attn(x, group_size)
        return out, *torch.autograd.grad((out * weight).sum() / images, [x, *attn.parameters()])

    out, grad_x, *grads = run(tokens(images), weight)
    moved_out, moved_grad_x, *moved_grads = run(tokens(images)[order], weight[order])
    torch.testing.assert_close(moved_out, out[order], rtol=0, atol=1e-5)
    torch.testing.assert_close(moved_grad_x, grad_x[order], rtol=0, atol=1e-5)
    torch.testing.assert_close(moved_grads, grads, rtol=0, atol=1e-5)


def test_an_image_feels_all_images_of_its_group_and_no_other(attn):
    x = tokens(6).requires_grad_()
    for image in range(6):
        (grad,) = torch.autograd.grad(attn(x, 3)[image].square().sum(), x)
        felt = grad.flatten(1).abs().amax(dim=1)
        same_group = torch.arange(6) // 3 == image // 3
        assert (felt[same_group] > 1e-4).all()
        assert (felt[~same_group] == 0).all()


class Operators(TorchDispatchMode):
    """Notes the name of each operator that is dispatched."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("group_size", [1, 4])
def test_forward_attends_once_and_copies_nothing(group_size, training, dtype):
    attn = GroupAttention(32, 4).to(dtype)
    x = torch.randn(8, TOKENS, 32, dtype=dtype)
    with Operators() as operators, torch.set_grad_enabled(training):
        attn(x, group_size)
    assert sum("scaled_dot_product" in name for name in operators.names) == 1
    assert not [name for name in operators.names if any(w in name for w in ("clone", "copy", "contiguous", "cat"))]


def test_a_batch_that_is_not_whole_groups_is_refused():
    with pytest.raises((RuntimeError, ValueError)):
        GroupAttention(WIDTH, HEADS)(tokens(5), 2)
