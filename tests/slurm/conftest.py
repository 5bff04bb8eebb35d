"""A real Slurm on this machine, for the tests in this folder."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

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
