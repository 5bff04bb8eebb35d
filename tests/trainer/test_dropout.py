"""A run with dropout depends neither on how its step is computed nor on interruptions; samples drop nothing."""

import pytest

from tests.trainer.forked import TINY, train_tiny
from trainer.checkpoints.weights import WeightSource
from trainer.config.tree import load_config
from trainer.loop import train
from trainer.sampling.samples import make_samples

RUN = ["path=jit", "model.backbone=jit", "model.depth=4", "model.context_tokens=2", "model.context_start=1"]
RUN += ["model.dropout=0.2", "train.images=256", "checkpoint.every=128", "optim.lr=0.03", "optim.warmup=0"]
RUNS = {  # name -> (ranks, overrides)
    "whole": (1, ["engine=single"]),
    "without": (1, ["engine=single", "model.dropout=0"]),
    "recomputed": (1, ["engine=single", "activation_checkpointing=1"]),
    "accumulated": (1, ["engine=single", "train.micro_batch=4"]),
    "looking": (1, ["engine=single", "train.sample_every=64"]),
    "ddp": (2, ["engine=ddp"]),
    "fsdp": (2, ["engine=fsdp", "activation_checkpointing=1", "train.micro_batch=8"]),
    "zero": (2, ["engine=deepspeed", "zero=2"]),
}
LAST = "checkpoints/000000000256"


@pytest.fixture(scope="module")
def runs(module_ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dropout")
    for world in (1, 2):
        calls = [[*RUN, *more, f"run={folder}/{name}"] for name, (ranks, more) in RUNS.items() if ranks == world]
        module_ranks.run_many(world, train_tiny, *calls)
    return folder


@pytest.fixture
def losses(runs, metrics):
    return lambda name: [row["loss"] for row in metrics(runs / name)]


@pytest.mark.parametrize("name", ["recomputed", "looking"])
def test_recomputing_and_sampling_leave_it_as_it_is_bit_for_bit(runs, losses, tensors, name):
    assert losses(name) == losses("whole")
    expected, found = tensors(runs / "whole" / LAST), tensors(runs / name / LAST)
    assert all((found[key] == tensor).all() for key, tensor in expected.items())


@pytest.mark.parametrize("name", ["accumulated", "ddp", "fsdp", "zero"])
def test_micro_batches_and_ranks_drop_what_one_process_does(losses, name):
    whole, without = losses("whole"), losses("without")
    assert losses(name) == pytest.approx(whole, rel=1e-4)
    assert max(abs(a - b) / a for a, b in zip(whole, without, strict=True)) > 1e-2


def test_a_stopped_run_continues_bit_for_bit(runs, losses, metrics, tensors, tmp_path):
    config = load_config(TINY, [*RUN, "engine=single", f"run={tmp_path}"])
    answers = iter([False, False, True])
    assert train(config, stop_requested=lambda: next(answers)) == "stopped"
    assert train(config) == "finished"
    assert [row["loss"] for row in metrics(tmp_path)] == losses("whole")
    expected, found = tensors(runs / "whole" / LAST), tensors(tmp_path / LAST)
    assert all((found[key] == tensor).all() for key, tensor in expected.items())


def test_samples_drop_nothing(runs):
    config = load_config(runs / "whole/config.yaml")
    never = load_config(runs / "without/config.yaml")
    source = WeightSource(runs / "whole" / LAST)
    found, expected = (make_samples(source, each)[0] for each in (config, never))
    assert (found == expected).all() and found.std() > 0
