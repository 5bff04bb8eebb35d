"""How to add a schedule of the learning rate: a function of the images seen, and one line in a dict."""

import json
import math

import pytest

from trainer.config.tree import load_config
from trainer.engines.schedules import SCHEDULES
from trainer.errors import RunError
from trainer.loop import train


def inverse_root(optim, position, images):
    """The share of `lr` above `final_lr`: as in Vaswani et al. 2017, with any warm-up."""
    return math.sqrt(optim.warmup / position)


@pytest.fixture(autouse=True)
def added(monkeypatch):
    monkeypatch.setitem(SCHEDULES, "inverse_root", inverse_root)


def test_a_run_follows_it_from_the_end_of_the_warm_up(tmp_path):
    options = [f"run={tmp_path}", "engine=single", "optim.schedule=inverse_root", "optim.warmup=64", "train.images=256"]
    train(load_config("tests/trainer/tiny.yaml", options))
    rates = [json.loads(line)["lr"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rates == pytest.approx([5e-4, 1e-3, *(1e-3 * math.sqrt(2 / step) for step in range(3, 9))])


def test_a_schedule_that_is_not_there_is_refused_in_one_line():
    with pytest.raises(RunError, match=r"^optim.schedule=step: .* 'wsd' or 'inverse_root'"):
        load_config("tests/trainer/tiny.yaml", ["optim.schedule=step"])
