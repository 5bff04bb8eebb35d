"""tools/submit.py on a real Slurm."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from trainer import checkpoint

ROOT = Path(__file__).parents[2]
SMALL = [
    "configs/digits.yaml",
    "model.depth=2",
    "model.width=32",
    "train.images=1280",
    "train.global_batch=128",
    "train.log_every=128",
    "train.sample_every=0",
]
LAST = "checkpoints/000000001280"


def submit(run: Path, *options: str, env: dict[str, str]) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/submit.py", *options, *SMALL, f"run={run}"]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


def averaged_weights(run: Path) -> dict[str, torch.Tensor]:
    stored = FileSystemReader(run / LAST).read_metadata().state_dict_metadata
    ema = {key.removeprefix("ema."): torch.empty(stored[key].size) for key in stored if key.startswith("ema.")}
    checkpoint.load(run / LAST, {"ema": ema})
    return ema


def test_two_nodes_train_as_two_local_processes(
    two_nodes: dict[str, str], assert_completes: Callable[[str, Path], None], tmp_path: Path
):
    here, there = tmp_path / "local", tmp_path / "slurm"

    submitted = submit(there, "--nodes", "2", "--procs", "1", "--cpu", env=two_nodes)
    assert submitted.returncode == 0, submitted.stderr
    job, run, logs = re.fullmatch(r"job (\d+): run folder (.+), logs in (.+)\n", submitted.stdout).groups()
    assert run == str(there)
    assert_completes(job, Path(logs))
    for rank in (0, 1):
        assert f"node={rank}(2), global_rank={rank}(2)" in (Path(logs) / f"{job}_{rank}_log.out").read_text()

    local = submit(here, "--cluster", "local", "--procs", "2", env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert local.returncode == 0, local.stderr
    metrics = (there / "metrics.jsonl").read_text()
    assert len(metrics.splitlines()) == 10
    assert metrics == (here / "metrics.jsonl").read_text()
    ema, expected = averaged_weights(there), averaged_weights(here)
    assert ema.keys() == expected.keys() and ema
    assert all(torch.equal(ema[name], expected[name]) for name in ema)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--nodes", "2"], r"error: sbatch: not found .*--cluster local\n"),
        (["--nodes", "2", "--cluster", "local"], r"error: --nodes 2: --cluster local is this one machine.*\n"),
    ],
)
def test_nodes_without_slurm(options: list[str], error: str, tmp_path: Path):
    run = tmp_path / "run"
    result = submit(run, *options, "--procs", "1", env=os.environ | {"PATH": str(tmp_path)})
    assert result.returncode == 1
    assert re.fullmatch(error, result.stderr)
    assert not run.exists()
