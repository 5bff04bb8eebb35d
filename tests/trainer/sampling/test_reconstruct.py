"""Averages made after training, from the snapshots of real runs, are those that a run had tracked."""

import os
import random

import pytest
import torch
from safetensors.torch import load_file

from tests.trainer.forked import train_tiny
from tools import reconstruct_ema
from trainer.checkpoints import folder as checkpoint
from trainer.checkpoints.weights import read_part
from trainer.errors import RunError
from trainer.sampling.reconstruct import reconstruct

SNAPSHOTS = ["optim.power_ema=[0.05,0.1]", "checkpoint.snapshot_every=32", "checkpoint.keep=1"]


@pytest.mark.parametrize("engine", ["single", "fsdp", "zero3"])
def test_what_is_reconstructed_is_what_a_run_has_tracked(engine, ranks, tmp_path):
    """Uneven shards (the label table has 11 rows); tracked and snapshotted by one run, tracked alone by another."""
    world = 1 if engine == "single" else 2
    options = ["engine=deepspeed", "zero=3"] if engine == "zero3" else [f"engine={engine}"]
    options += ["train.images=320", "optim.lr=1e-2"]
    std, steps = random.SystemRandom().uniform(0.06, 0.2), random.SystemRandom().randrange(6, 11)
    tracking = [*options, f"run={tmp_path}/tracked", f"optim.power_ema=[{std}]", "checkpoint.every=32"]
    ranks.run_many(world, train_tiny, [*options, *SNAPSHOTS, f"run={tmp_path}/run"], tracking)
    out = tmp_path / "out.safetensors"
    for wanted in (std, 0.1):
        out.unlink(missing_ok=True)
        reconstruct(tmp_path / "run", wanted, out, 32 * steps)
        source = tmp_path / (f"tracked/checkpoints/{32 * steps:012d}" if wanted == std else "run/snapshots/")
        if wanted == 0.1:
            source /= f"{32 * steps:012d}"
        expected, found = read_part(source, f"ema-{wanted}"), load_file(out)
        assert found.keys() == expected.keys()
        for name in expected:
            assert torch.allclose(found[name], expected[name], rtol=0, atol=1e-6), (name, wanted, steps)


def test_snapshots_stay_and_are_made_again_by_a_run_that_goes_back(ranks, tmp_path, tensors):
    run = tmp_path / "run"
    ranks.run(1, train_tiny, "engine=single", *SNAPSHOTS, f"run={run}", "train.images=160")
    complete, _ = checkpoint.find(run / "snapshots")
    assert [int(path.name) for path in complete] == [32, 64, 96, 128, 160]
    ranks.run(2, train_tiny, *SNAPSHOTS, f"run={run}", "train.images=256")
    complete, _ = checkpoint.find(run / "snapshots")
    assert [int(path.name) for path in complete] == list(range(32, 257, 32))
    ranks.run(1, train_tiny, "engine=single", *SNAPSHOTS, f"run={tmp_path}/whole", "train.images=256")
    last, whole = (tensors(folder / f"snapshots/{256:012d}") for folder in (run, tmp_path / "whole"))
    assert last.keys() == whole.keys()
    assert all(torch.allclose(last[name], whole[name], atol=1e-6) for name in last)


def test_what_cannot_be_reconstructed_is_one_line(ranks, tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "out.safetensors"
    ranks.run_many(
        1, train_tiny, ["engine=single", *SNAPSHOTS, f"run={run}", "train.images=96"], [f"run={tmp_path}/none"]
    )
    for arguments, message in (
        ([tmp_path / "none", out, "--std", "0.1"], "no snapshots"),
        ([run, out, "--std", "0.5"], "std=0.5"),
        ([run, out, "--std", "0.1", "--position", "3200"], "step=100"),
        ([run, tmp_path / "out.pt", "--std", "0.1"], "ends in .safetensors"),
    ):
        with pytest.raises(RunError, match=message):
            reconstruct_ema.main([str(argument) for argument in arguments])
        assert not out.exists()
    damaged = next((run / "snapshots/000000000096").glob("*.distcp"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(RunError, match=damaged.name):
        reconstruct(run, 0.1, out)


def train_till_second_save(*overrides):
    """Killed when the first of what is saved at the last position is on disk."""
    save, done = checkpoint.save, []

    def then_die(folder, position, *rest, **options):
        if position == 160 and done:
            os._exit(9)
        save(folder, position, *rest, **options)
        done.extend([folder] * (position == 160))

    checkpoint.save = then_die
    train_tiny(*overrides)


def test_killed_between_snapshot_and_checkpoint_a_run_has_all_snapshots(ranks, tmp_path):
    run = [f"run={tmp_path}/run", "engine=single", *SNAPSHOTS, "train.images=160"]
    assert ranks.finish(ranks.start(1, train_till_second_save, *run))[0][0] == 9
    ranks.run(1, train_tiny, *run)
    complete, _ = checkpoint.find(tmp_path / "run/snapshots")
    assert [int(path.name) for path in complete] == [32, 64, 96, 128, 160]
