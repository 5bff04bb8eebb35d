"""A real Slurm on this machine, for the tests in this folder."""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

TIME_LIMIT = 240  # seconds for a job, on a busy machine
CLUSTER = Path(__file__).with_name("cluster.sh")


@pytest.fixture(scope="session")
def two_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A Slurm cluster of node1 and node2: the environment variables of a process that shall find it."""
    for program in ("munged", "slurmctld", "slurmd", "sbatch"):
        if not shutil.which(program, path=os.environ["PATH"] + ":/usr/sbin:/sbin"):
            pytest.skip(f"{program}: not installed; for this test: sudo tests/slurm/cluster.sh install")
    env = os.environ | {"SLURM_TEST_DIR": str(tmp_path_factory.mktemp("slurm"))}
    try:
        subprocess.run([CLUSTER, "up", "2"], env=env, check=True)
        variables = subprocess.run([CLUSTER, "env"], env=env, check=True, capture_output=True, text=True).stdout
        yield os.environ | dict(line.split("=", 1) for line in variables.splitlines())
    finally:
        subprocess.run([CLUSTER, "down"], env=env, check=True)


@pytest.fixture(scope="session")
def assert_completes(two_nodes: dict[str, str]) -> Callable[[str, Path], None]:
    """Waits until a job has ended; shows its logs if it did not end well."""

    def wait(job: str, logs: Path) -> None:
        end = time.monotonic() + TIME_LIMIT
        state = "PENDING"
        while state in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING") and time.monotonic() < end:
            time.sleep(0.5)
            show = ["scontrol", "show", "job", job]
            record = subprocess.run(show, env=two_nodes, capture_output=True, text=True, check=True)
            state = re.search(r"JobState=(\w+)", record.stdout).group(1)
        tails = [f"== {file}\n{file.read_text()[-2000:]}" for file in sorted(logs.glob("*_log.*"))]
        assert state == "COMPLETED", "\n".join(tails)

    return wait
