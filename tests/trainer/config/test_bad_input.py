"""What is wrong is said in one line, the exit code is not 0, and nothing written is lost or half-written."""

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from models.objectives.denoising import Denoising
from models.objectives.registry import TERMS
from tests.in_process import call
from tests.patience import PATIENCE
from trainer import loop
from trainer.config.tree import load_config
from trainer.errors import RunError


def submit(*arguments, procs=2):
    command = [sys.executable, "tools/submit.py", "--cluster", "local", "--procs", str(procs), *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=PATIENCE, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


def last_line(done) -> str:
    assert done.returncode not in (0, None)
    lines = done.stderr.strip().splitlines()
    assert lines[-1].startswith("error: "), done.stderr
    assert "Traceback" not in done.stderr.split("error: ")[-1]
    return lines[-1]


def refusal(*arguments: object) -> str:
    """What is said before any process starts."""
    said = call("submit", "--cluster", "local", "--procs", 2, *arguments, code=1).err
    assert said.startswith("error: ") and said.count("\n") == 1, said
    return said


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny):
    """A finished run of 10 steps on two ranks."""
    run = tmp_path_factory.mktemp("trained") / "run"
    done = submit(tiny, f"run={run}", "train.images=320")
    assert done.returncode == 0, done.stderr
    assert f"finished: {run}" in done.stdout
    return run


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("groups.sise=4", "groups.size"),
        ("train.global_batch=36", "32 or 40"),
        ("groups.size=9", "model.max_group_size=8"),
    ],
)
def test_a_config_that_cannot_be_run_leaves_no_run_folder(override, named, tiny, tmp_path):
    run = tmp_path / "run"
    assert named in refusal(tiny, f"run={run}", override)
    assert not run.exists()


def test_a_missing_config(tmp_path):
    assert "no such config file" in refusal(tmp_path / "nothing.yaml")


@pytest.mark.parametrize(
    ("override", "named"),
    [("model.width=64", ["model.width=64", "model.width=32"]), ("optim.lr=2e-3", ["optim.lr=0.002", "optim.lr=0.001"])],
)
def test_a_run_folder_of_another_config_stays_as_it_is(override, named, run, tiny):
    before = contents(run)
    message = refusal(tiny, f"run={run}", "train.images=640", override)
    assert all(name in message for name in named)
    assert contents(run) == before


def test_a_checkpoint_of_another_model_shape_is_named_with_both_shapes(run, tiny, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run / "checkpoints", other / "checkpoints")
    message = last_line(submit(tiny, f"run={other}", "model.width=64"))
    assert "model.x_embedder.proj.weight" in message and "(32, 4)" in message and "(64, 4)" in message
    assert contents(other / "checkpoints") == contents(run / "checkpoints")


def test_a_truncated_checkpoint_file_is_named_and_the_one_before_it_can_be_used(run, tiny):
    newest = run / "checkpoints/000000000320"
    file = random.SystemRandom().choice(sorted(newest.glob("*.distcp")))
    size = file.stat().st_size
    os.truncate(file, size // 2)
    command = (tiny, f"run={run}", "train.images=640")
    message = last_line(submit(*command))
    assert str(file) in message and str(size) in message and f"remove {newest}" in message
    shutil.rmtree(newest)
    done = submit(*command)
    assert done.returncode == 0, done.stderr
    assert "continuing from" in done.stderr and "000000000160" in done.stderr


def test_a_loss_that_is_not_finite_stops_all_ranks_and_names_the_step(tiny, tmp_path):
    run = tmp_path / "run"
    message = last_line(submit(tiny, f"run={run}", "optim.lr=1e30", "optim.warmup=0", "train.log_every=320"))
    assert "step 1: " in message and "not finite" in message and "optim.lr" in message
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 1, "the steps before it, and none after"
    assert not (run / "checkpoints").exists()


@pytest.mark.parametrize("poison", ["nan", "inf"])
def test_a_loss_that_is_not_finite_at_a_random_step_keeps_the_last_good_checkpoint(poison, tiny, tmp_path, monkeypatch):
    step = random.SystemRandom().randrange(20)
    run = tmp_path / "run"
    config = load_config(tiny, ["engine=single", f"run={run}", "checkpoint.every=96", "train.log_every=224"])
    calls = iter(range(10**9))

    class Poisoned(Denoising):
        def __call__(self, *args):
            factor = float(poison) if next(calls) // 2 == step else 1.0  # two micro-batches a step: groups, singles
            return super().__call__(*args) * factor

    monkeypatch.setitem(TERMS, "denoising", Poisoned)
    with pytest.raises(RunError, match=f"^step {step}: "):
        loop.train(config)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == step
    kept = sorted(int(path.name) for path in (run / "checkpoints").glob("*"))
    assert kept == list(range(96, step * 32 + 1, 96))
    monkeypatch.undo()
    assert loop.train(config) == "finished", "without what spoilt it the run goes on from there"
