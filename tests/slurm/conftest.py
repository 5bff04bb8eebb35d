"""A real Slurm on this machine, for the tests in this folder."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from slurm.state import RunState, describe, read_state
from tests.patience import PATIENCE

ROOT = Path(__file__).parents[2]
CLUSTER = Path(__file__).with_name("cluster.sh")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A Slurm cluster of node1 to node8: the environment variables of a process that shall find it."""
    for program in ("munged", "slurmctld", "slurmd", "sbatch"):
        if not shutil.which(program, path=os.environ["PATH"] + ":/usr/sbin:/sbin"):
            pytest.skip(f"{program}: not installed; for this test: sudo tests/slurm/cluster.sh install")
    env = os.environ | {"SLURM_TEST_DIR": str(tmp_path_factory.mktemp("slurm"))}
    try:
        subprocess.run([CLUSTER, "up", "8"], env=env, check=True)
        variables = subprocess.run([CLUSTER, "env"], env=env, check=True, capture_output=True, text=True).stdout
        yield env | dict(line.split("=", 1) for line in variables.splitlines())
    finally:
        subprocess.run([CLUSTER, "down"], env=env, check=True)


@pytest.fixture(scope="session")
def assert_completes(cluster: dict[str, str]) -> Callable[[str, Path], None]:
    """Waits until a job has ended; shows its logs if it did not end well."""

    def wait(job: str, logs: Path) -> None:
        end = time.monotonic() + PATIENCE
        state = "PENDING"
        while state in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING") and time.monotonic() < end:
            time.sleep(0.5)
            show = ["scontrol", "show", "job", job]
            record = subprocess.run(show, env=cluster, capture_output=True, text=True, check=True)
            state = re.search(r"JobState=(\w+)", record.stdout).group(1)
        tails = [f"== {file}\n{file.read_text()[-2000:]}" for file in sorted(logs.glob("*_log.*"))]
        assert state == "COMPLETED", "\n".join(tails)

    return wait


@pytest.fixture(scope="session")
def submit(cluster: dict[str, str]) -> Callable[..., subprocess.CompletedProcess]:
    """tools/submit.py where Slurm is."""

    def run(*arguments: object, env: dict[str, str] = cluster, root: Path = ROOT) -> subprocess.CompletedProcess:
        command = [sys.executable, "tools/submit.py", *map(str, arguments)]
        return subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=PATIENCE)

    return run


@pytest.fixture(scope="session")
def wait_for_end() -> Callable[..., RunState]:
    """Waits until a run will do nothing more by itself; its state."""

    def wait(run: Path) -> RunState:
        end = time.monotonic() + PATIENCE
        while not (state := read_state(run)).ended:
            assert time.monotonic() < end, describe(run, state)
            time.sleep(0.3)
        return state

    return wait


@pytest.fixture(scope="session")
def tensors_at() -> Callable[[Path, int], dict[str, torch.Tensor]]:
    """All tensors of a run's checkpoint at a position."""

    def read(run: Path, position: int) -> dict[str, torch.Tensor]:
        folder = run / f"checkpoints/{position:012d}"
        stored = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
        state = {k: torch.empty(m.size) for k, m in stored.items() if isinstance(m, TensorStorageMetadata)}
        dcp.load(state, checkpoint_id=folder)
        return state

    return read
