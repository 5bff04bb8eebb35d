"""Parts of a block: an MLP that is one matrix, and a wrapper that drops what a block adds to its tokens. They are this
file, a line in MLPS and a line in WRAPPERS."""

import pytest
import torch
from torch import nn

from models.backbones.base import WRAPPERS
from models.backbones.dit import DiT
from models.backbones.mlp import MLPS
from models.backbones.registry import make_network, model_config
from tests.extending.toy import tiny, train_resume_and_sample
from trainer.errors import RunError


def odd_blocks_pass(block, number, config):
    """Leave out what blocks of odd numbers add."""
    inner = block.forward
    block.forward = lambda x, *others: x + 0 * inner(x, *others) if number % 2 else inner(x, *others)


@pytest.fixture(autouse=True)
def parts(monkeypatch):
    monkeypatch.setitem(MLPS, "matrix", lambda width, hidden: nn.Linear(width, width))
    monkeypatch.setitem(WRAPPERS, "pass", odd_blocks_pass)


def test_toy_parts_train_resume_and_sample(tmp_path):
    weights, _ = train_resume_and_sample(
        tmp_path, "model.mlp=matrix", "model.wrap=[pass]", "activation_checkpointing=1"
    )
    assert weights["blocks.0.mlp.weight"].shape == (32, 32)


def test_a_wrapper_changes_no_name_and_no_first_weight():
    plain, wrapped = {}, {}
    for found, wrap in ((plain, ()), (wrapped, ("pass",))):
        torch.manual_seed(0)
        found |= make_network(DiT.Config(depth=2, width=8, heads=2, wrap=wrap), 1, 4, 3).state_dict()
    assert plain.keys() == wrapped.keys() and all(torch.equal(plain[name], wrapped[name]) for name in plain)
    assert model_config("jit").mlp == "swiglu" and model_config({}).mlp == "gelu"


def test_parts_that_are_not_there_are_named(tmp_path):
    with pytest.raises(RunError, match=r"^model\.mlp=none: input should be 'gelu', 'swiglu' or 'matrix'"):
        tiny(tmp_path, "model.mlp=none")
    with pytest.raises(RunError, match=r"^model\.wrap\.0=cache: input should be 'pass'"):
        tiny(tmp_path, "model.wrap=[cache]")
