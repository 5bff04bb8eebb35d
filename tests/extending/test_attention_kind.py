"""A kind of attention: the mean of a group's values, whatever the queries say. It is this file, and one line in
ATTENTION."""

import pytest
import torch

from models.backbones.attention import ATTENTION
from tests.extending.toy import tiny, train_resume_and_sample
from trainer.errors import RunError


def mean_of_group(q, k, v, groups):
    size, grouped = groups
    shared = v if grouped is None else v[:grouped]
    means = shared.unflatten(0, (-1, size)).mean(dim=(1, 2), keepdim=True).expand(-1, size, v.shape[1], -1, -1)
    alone = v[len(shared) :].mean(dim=1, keepdim=True).expand(-1, v.shape[1], -1, -1)
    return torch.cat([means.flatten(0, 1), alone]) + 0 * (q + k)


def test_a_toy_attention_trains_resumes_and_samples(monkeypatch, tmp_path):
    monkeypatch.setitem(ATTENTION, "mean", mean_of_group)
    weights, _ = train_resume_and_sample(tmp_path / "mean", "model.attention=mean", "groups.window=[null,0]")
    others, _ = train_resume_and_sample(tmp_path / "softmax", "groups.window=[null,0]")
    assert weights.keys() == others.keys()
    assert not torch.equal(weights["blocks.0.attn.proj.weight"], others["blocks.0.attn.proj.weight"])


def test_one_that_is_not_there_is_named(tmp_path):
    with pytest.raises(RunError, match=r"^model\.attention=mean: input should be 'softmax'"):
        tiny(tmp_path, "model.attention=mean")
