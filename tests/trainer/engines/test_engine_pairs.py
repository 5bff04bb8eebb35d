"""A run may stop under any engine on any number of ranks, and go on under any other."""

import json

import pytest

from tests.trainer.forked import GROUPS, train_tiny
from tests.trainer.go_on import go_on

ENGINES = {  # name -> (ranks, overrides)
    "single-1": (1, ["engine=single"]),
    "ddp-2": (2, ["engine=ddp"]),
    "fsdp-2": (2, ["engine=fsdp"]),
    "fsdp-4": (4, ["engine=fsdp"]),
    "hsdp-2x2": (4, ["engine=hsdp", "shard_size=2"]),
    "zero1-2": (2, ["engine=deepspeed", "zero=1"]),
    "zero2-2": (2, ["engine=deepspeed", "zero=2", GROUPS]),
    "zero3-2": (2, ["engine=deepspeed", "zero=3"]),
    "zero3-4": (4, ["engine=deepspeed", "zero=3", GROUPS]),
}
# Parameters whose first dimension is smaller than the ranks (1: the output of a patch of one pixel) or not divisible by
# them (11: labels), and sizes that ZeRO's flat shards must pad.
UNEVEN = ["model.patch=1", "model.width=36", "model.heads=3", "model.depth=1", "optim.power_ema=[0.1]"]


def worlds():
    return {world: [name for name, (ranks, _) in ENGINES.items() if ranks == world] for world in (1, 2, 4)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pairs")


@pytest.fixture(scope="module")
def stopped(module_ranks, folder):
    """Runs of each engine that stopped after 3 steps, and a whole one of 6."""
    module_ranks.run(1, train_tiny, *UNEVEN, "engine=single", f"run={folder}/whole", "train.images=192")
    for world, names in worlds().items():
        runs = ([*ENGINES[n][1], *UNEVEN, f"run={folder}/from-{n}", "train.images=96"] for n in names)
        module_ranks.run_many(world, train_tiny, *runs)
    return folder


def test_all_engines_train_alike(stopped, metrics):
    expected = [[row["loss"], row["grad_norm"]] for row in metrics(stopped / "whole")[:3]]
    for name in ENGINES:
        found = [[row["loss"], row["grad_norm"]] for row in metrics(stopped / f"from-{name}")]
        for a, b in zip(found, expected, strict=True):
            assert a == pytest.approx(b, abs=1e-5, rel=0), name


def test_what_one_engine_saved_another_loads_bit_for_bit_and_goes_on_with(ranks, stopped, metrics):
    """Weights, averages and moments; what it computes with its averages and its weights; the losses of three steps."""
    expected = [row["loss"] for row in metrics(stopped / "whole")[3:]]
    for world, names in worlds().items():
        runs = ([*UNEVEN, *ENGINES[name][1], f"run={stopped}/{name}"] for name in names)
        ranks.run_many(world, go_on, *runs)
        for name in names:
            results = json.loads((stopped / f"{name}.json").read_text())
            assert len(results) == len(ENGINES)
            for source, result in results.items():
                assert result["errors"] == pytest.approx([0, 0, 0], abs=1e-5), (source, name)
                assert result["losses"] == pytest.approx(expected, abs=1e-5, rel=0), (source, name)
