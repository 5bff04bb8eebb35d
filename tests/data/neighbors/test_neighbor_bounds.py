"""The error bounds by which the neighbour search proves its answers."""

import numpy as np
import pytest
import torch

from data.neighbors.exact import ExactSearch


def worst_for_bfloat16(length, share):
    """Two unit vectors whose numbers lie just beside the middle between two bfloat16 numbers, so that all errors of
    rounding add up; beside random ones."""
    low, high = (2.0**-5 * (1 + 2**-8 + side * 2**-14) for side in (-1, 1))
    cut = int(share * length)
    a = np.r_[np.full(cut, low), np.full(length - cut, high)]
    b = np.r_[np.full(cut, low), np.full(length - cut, -high)]
    random = np.random.default_rng(0).normal(size=(60, length))
    rows = np.concatenate([[a, b, a[::-1], b[::-1]], random])
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("length", [3, 64, 1016])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.66, 1.0])
def test_no_product_is_further_off_than_its_bound(length, share):
    rows = worst_for_bfloat16(length, share)
    search = ExactSearch(rows, precision="bf16")
    exact = rows @ rows.T
    assert len(search._looks) == 2
    for look in search._looks:
        products = (look.unit @ look.unit.T).double().numpy()
        assert np.abs(products - exact).max() <= look.error


@pytest.mark.parametrize("seed", range(3))
def test_neighbors_that_bfloat16_puts_in_the_wrong_order_are_found(seed):
    """The nearest, rounded down by bfloat16, among so many rounded up that it is no candidate at first sight."""
    rng = np.random.default_rng(seed)
    length, number = 512, 700
    anchor = worst_for_bfloat16(length, 0.66)[0]
    other = rng.normal(size=(number, length))
    other -= (other @ anchor)[:, None] * anchor
    other /= np.linalg.norm(other, axis=1, keepdims=True)
    cosine = 0.5 + rng.uniform(0, 2e-3, size=(number, 1))
    rows = np.concatenate([anchor[None], cosine * anchor + np.sqrt(1 - cosine**2) * other])
    expected = 1 + np.argsort(-cosine[:, 0], kind="stable")[:20]
    for precision in ("bf16", "fp32"):
        ids, _ = ExactSearch(rows, precision=precision).nearest(np.array([0]), 20)
        assert ids[0].tolist() == expected.tolist()


def test_switches_of_the_program_are_left_as_they_are():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        ExactSearch(np.eye(4)).nearest(np.arange(4), 2)
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
