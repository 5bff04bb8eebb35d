import pytest
import torch

from models.backbones import attention_mass as module
from models.backbones.attention_mass import attention_mass, cross_share, observing, s_cross, token_attention

SEEDS = range(4)
SIZES = pytest.mark.parametrize("group_size", [2, 3, 4, 8])


def queries_and_keys(seed, group_size, groups=3, heads=2, tokens=5, width=8, scale=1.5):
    generator = torch.Generator().manual_seed(seed)
    shape = (groups, heads, group_size * tokens, width)
    return (scale * torch.randn(2, *shape, generator=generator)).unbind()


def whole_attention(q, k):
    """(groups, heads, N * L, N * L) in float64, one query and key at a time."""
    products = torch.einsum("ghid,ghjd->ghij", q.double(), k.double()) / q.shape[-1] ** 0.5
    return products.exp() / products.exp().sum(dim=-1, keepdim=True)


def whole_mass(q, k, group_size):
    """P from the whole matrix, an entry at a time."""
    attention, tokens = whole_attention(q, k).mean(dim=1), q.shape[2] // group_size
    mass = torch.empty(len(q), group_size, group_size, dtype=torch.float64)
    for i in range(group_size):
        for j in range(group_size):
            block = attention[:, i * tokens : (i + 1) * tokens, j * tokens : (j + 1) * tokens]
            mass[:, i, j] = block.sum(dim=2).mean(dim=1)
    return mass


@pytest.mark.parametrize("block", [1, 47, 300, 1700, 2**22])
@pytest.mark.parametrize("seed", SEEDS)
@SIZES
def test_in_blocks_as_from_the_whole_matrix(monkeypatch, group_size, seed, block):
    monkeypatch.setattr(module, "BLOCK", block)
    sizes = []
    attend = module._attention
    monkeypatch.setattr(module, "_attention", lambda q, k: sizes.append(attend(q, k).numel()) or attend(q, k))
    q, k = queries_and_keys(seed, group_size)
    mass = attention_mass(q, k, group_size)
    torch.testing.assert_close(mass.double(), whole_mass(q, k, group_size), rtol=0, atol=1e-6)
    torch.testing.assert_close(mass.sum(dim=-1), torch.ones(3, group_size), rtol=0, atol=1e-5)
    assert max(sizes) <= max(block, 2 * group_size * 5)  # or the rows of one query


def test_bf16_is_summed_in_fp32_also_under_autocast():
    q, k = (part.bfloat16() for part in queries_and_keys(0, 4))
    with torch.autocast("cpu", torch.bfloat16):
        mass = attention_mass(q, k, 4)
    assert mass.dtype == torch.float32
    torch.testing.assert_close(mass.double(), whole_mass(q, k, 4), rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
@SIZES
def test_permuting_a_group_permutes_p(group_size, seed):
    q, k = queries_and_keys(seed, group_size)
    order = torch.randperm(group_size, generator=torch.Generator().manual_seed(seed))
    moved = [part.unflatten(2, (group_size, -1))[:, :, order].flatten(2, 3) for part in (q, k)]
    mass, found = attention_mass(q, k, group_size), attention_mass(*moved, group_size)
    torch.testing.assert_close(found, mass[:, order][:, :, order], rtol=0, atol=1e-6)
    torch.testing.assert_close(s_cross(found), s_cross(mass)[:, order], rtol=0, atol=1e-5)
    torch.testing.assert_close(cross_share(found), cross_share(mass)[:, order], rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
@SIZES
def test_uniform_attention(group_size, seed):
    _, k = queries_and_keys(seed, group_size)
    mass = attention_mass(torch.zeros_like(k), k, group_size)
    torch.testing.assert_close(s_cross(mass), torch.zeros(3, group_size), rtol=0, atol=1e-6)
    uniform = torch.full((3, group_size), (group_size - 1) / group_size)
    torch.testing.assert_close(cross_share(mass), uniform, rtol=0, atol=1e-6)


@SIZES
def test_attention_to_one_neighbour_only(group_size):
    """Image i looks for the mark of image i + 1, which all its keys bear."""
    mark = 20 * torch.eye(group_size, 8)
    q, k = (part.repeat_interleave(5, dim=0).expand(3, 2, -1, -1) for part in (mark.roll(-1, dims=0), mark))
    mass = attention_mass(q, k, group_size)
    torch.testing.assert_close(mass, torch.eye(group_size).roll(1, dims=1).expand(3, -1, -1), rtol=0, atol=1e-6)
    most = torch.full((3, group_size), 1 - 1 / (group_size - 1))
    torch.testing.assert_close(s_cross(mass), most, rtol=0, atol=1e-6)
    torch.testing.assert_close(cross_share(mass), torch.ones(3, group_size), rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_scores_by_hand(seed):
    mass = torch.rand(5, 4, 4, generator=torch.Generator().manual_seed(seed))
    mass = mass / mass.sum(dim=-1, keepdim=True)
    for group, scores, shares in zip(mass.tolist(), s_cross(mass), cross_share(mass), strict=True):
        for i, row in enumerate(group):
            others = [value for j, value in enumerate(row) if j != i]
            assert scores[i] == pytest.approx((max(others) - sum(others) / 3) / max(others), abs=1e-6)
            assert shares[i] == pytest.approx(1 - row[i], abs=1e-6)


def test_groups_of_two_are_always_even_and_an_image_alone_has_no_score():
    for seed in SEEDS:
        assert (s_cross(attention_mass(*queries_and_keys(seed, 2), 2)) == 0).all()
    with pytest.raises(ValueError, match="group_size=1: an image alone sends no attention to others"):
        s_cross(torch.ones(3, 1, 1))


def test_images_that_see_themselves_alone_have_score_0():
    assert (s_cross(torch.eye(4)) == 0).all() and (cross_share(torch.eye(4)) == 0).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_attention_of_one_token_is_a_row_of_the_whole(seed):
    q, k = queries_and_keys(seed, 3)
    expected = whole_attention(q, k).mean(dim=1).unflatten(-1, (3, 5))
    found = [token_attention(q, k, 3, token) for token in range(15)]
    torch.testing.assert_close(torch.stack(found, dim=1).double(), expected, rtol=0, atol=1e-6)
    of_first = torch.stack(found[:5]).sum(dim=-1).mean(dim=0)
    torch.testing.assert_close(of_first, attention_mass(q, k, 3)[:, 0], rtol=0, atol=1e-6)


@pytest.fixture(params=["dit", "jit"])
def network(request, random_dit, random_jit):
    return lambda seed, **changes: {"dit": random_dit, "jit": random_jit}[request.param](seed, **changes)


@pytest.mark.parametrize("group_layers", [None, (1,)])
@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_observed_is_what_the_modules_compute_with(network, random_inputs, seed, group_layers):
    """From the queries and keys that were seen, and values by hand, comes the module's own output."""
    net, inputs = network(seed, group_layers=group_layers), random_inputs(seed, 8, 4)
    seen, inner = [], []
    for block in net.blocks:
        block.attn.register_forward_hook(lambda attn, args, out: inner.append((attn, args[0], out)))
    with torch.no_grad():
        expected = net(*inputs, 4)
        inner.clear()
        with observing(net, lambda layer, q, k: seen.append((layer, q, k))):
            out = net(*inputs, 4)
    assert torch.equal(out, expected)
    assert [layer for layer, *_ in seen] == list(range(len(net.blocks))) and len(inner) == len(seen)
    for (layer, q, k), (attn, x, result) in zip(seen, inner, strict=True):
        assert len(q) == (2 if net.config.shares(layer) else 8)
        with torch.no_grad():
            v = attn.qkv(x).chunk(3, dim=-1)[2].reshape(len(q), -1, *q.shape[1::2]).transpose(1, 2)
            attended = whole_attention(q, k).float() @ v
            again = attn.proj(attended.transpose(1, 2).reshape(x.shape))
        torch.testing.assert_close(again, result, rtol=0, atol=1e-5)


def test_observing_a_compiled_network_computes_as_before_and_leaves_it_compiled(network, random_inputs):
    compiled, eager, inputs = network(0), network(0), random_inputs(0, 8, 4)
    calls = []
    for block in compiled.blocks:
        block.compile(backend=lambda graph, example: lambda *args: calls.append(1) or graph(*args))
    seen = []
    with torch.no_grad():
        compiled(*inputs, 4)
        before = len(calls)
        with observing(compiled, lambda layer, q, k: seen.append(attention_mass(q, k, 4))):
            out = compiled(*inputs, 4)
        assert before > 0 and len(calls) == before and len(seen) == len(compiled.blocks)
        assert torch.equal(out, eager(*inputs, 4)) and torch.equal(compiled(*inputs, 4), out)
    assert len(calls) == 2 * before and len(seen) == len(compiled.blocks)


def test_observing_changes_no_gradient(network, random_inputs):
    inputs = random_inputs(1, 8, 4)
    grads = []
    for see in (lambda layer, q, k: attention_mass(q, k, 4), None):
        net = network(1)
        if see:
            with observing(net, see):
                out = net(*inputs, 4)
        else:
            out = net(*inputs, 4)
        out.square().mean().backward()
        grads.append([parameter.grad for parameter in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
