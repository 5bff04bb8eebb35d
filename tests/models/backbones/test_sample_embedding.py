"""Weights of plain networks with, without, and for networks with a sample embedding: the same network each time."""

import copy

import pytest
import torch

from models.backbones.sample_embedding import CLASSES, CONTEXT, SLOTS, fit, fits, fold

SEEDS = range(3)
NETWORKS = pytest.mark.parametrize(
    ("kind", "changes"), [("dit", {}), ("jit", {}), ("jit", {"context_tokens": 0}), ("jit", {"context_start": 0})]
)


@pytest.fixture
def make(request):
    """A small network with random weights, by its kind."""
    return lambda kind, seed, **changes: request.getfixturevalue(f"random_{kind}")(seed, **changes)


def with_weights(network, weights):
    network.load_state_dict(weights)
    return network


@pytest.mark.parametrize("seed", SEEDS)
@NETWORKS
def test_without_a_sample_embedding_slots_do_not_matter_and_zeros_are_the_same(
    make, random_inputs, kind, changes, seed
):
    plain = make(kind, seed, max_group_size=0, **changes)
    assert SLOTS not in plain.state_dict() and fits(plain.state_dict(), plain.state_dict())
    x, t, label, slot = random_inputs(seed, 8, 4)
    expected = plain(x, t, label, torch.zeros_like(slot))
    assert torch.equal(plain(x, t, label, 1000 + slot), expected)
    zeros = make(kind, seed + 1, **changes)
    with_weights(zeros, plain.state_dict() | {SLOTS: torch.zeros_like(zeros.state_dict()[SLOTS])})
    assert torch.equal(zeros(x, t, label, slot), expected)


@pytest.mark.parametrize("seed", SEEDS)
@NETWORKS
def test_a_folded_row_leaves_the_network_as_it_is(make, random_inputs, kind, changes, seed):
    one, none = (make(kind, seed + rows, max_group_size=rows, **changes).requires_grad_(False) for rows in (1, 0))
    x, t, label, _ = random_inputs(seed, 8, 1)
    inputs = x, t, label, torch.zeros_like(label)
    before, weights = copy.deepcopy(one.state_dict()), one.state_dict()
    expected = one(*inputs)
    assert (with_weights(none, fold(weights))(*inputs) - expected).abs().max() < 1e-5 * expected.abs().max()

    folded = fold(weights)
    changed = {CLASSES, CONTEXT} & before.keys()
    assert folded.keys() == before.keys() - {SLOTS}
    assert all(torch.equal(folded[name], before[name]) for name in folded.keys() - changed)
    assert torch.equal(folded[CLASSES], before[CLASSES] + before[SLOTS])
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights.items())  # the given ones stay
    unfolded = with_weights(none, {name: before[name] for name in folded})(*inputs)
    assert (unfolded - expected).abs().max() > 1e-2 * expected.abs().max()  # the row matters


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("seed", SEEDS)
@NETWORKS
def test_group_diffusion_starts_exactly_at_a_plain_network_whatever_the_slot(
    make, random_inputs, kind, changes, seed, rows
):
    plain, groups = (make(kind, seed + more, max_group_size=more, **changes) for more in (rows, 8))
    x, t, label, slot = random_inputs(seed, 8, 4)
    expected = plain(x, t, label, torch.zeros_like(slot))
    assert fits(plain.state_dict(), groups.state_dict())
    with_weights(groups, fit(plain.state_dict(), groups.state_dict()))
    assert torch.equal(groups(x, t, label, slot), expected)
    assert not torch.equal(groups(x, t, label, slot, 4), expected)


@pytest.mark.parametrize(("had", "has"), [(2, 5), (5, 2), (2, 1), (3, 3)])
def test_of_several_rows_those_that_both_have_are_taken(make, had, has):
    weights, own = (make("dit", rows, max_group_size=rows).state_dict() for rows in (had, has))
    kept = own[SLOTS].clone()
    fitted = fit(weights, own)
    assert torch.equal(fitted[SLOTS], torch.cat([weights[SLOTS][:has], kept[had:]]))
    assert torch.equal(own[SLOTS], kept) and fitted.keys() == weights.keys()


def test_what_does_not_fit(make):
    """Several rows in a network without; rows of another width; a row without classes to add it to."""
    none, one, many = (make("dit", rows, max_group_size=rows).state_dict() for rows in (0, 1, 2))
    assert not fits(many, none) and fits(one, none) and fits(none, many)
    assert not fits(many | {SLOTS: torch.zeros(2, 25)}, many) and not fits(one | {SLOTS: torch.zeros(1, 25)}, none)
    assert not fits({SLOTS: one[SLOTS]}, none)
