"""What an exception that ends a rank says by its attributes; slurm/records.py hands it to the supervisor."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from trainer.errors import RunError
from trainer.ranks import process_group

ROOT = Path(__file__).parents[2]

ONE_OF_TWO = """
import os, torch, torch.distributed as dist
from trainer.ranks import process_group
try:
    with process_group(60) as ranks:
        if ranks.rank == 1:
            os._exit(1)
        dist.all_reduce(torch.ones(1))
except RuntimeError as error:
    print(error.at_fault, error.absent_ranks)
"""


@pytest.fixture
def two(monkeypatch):
    """Variables of rank 0 of 2; the port where they meet is taken."""
    with socket.socket(socket.AF_INET6) as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        env = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        yield taken


def test_a_rank_whose_peer_dies_says_so_and_which(two):
    two.close()
    command = [sys.executable, "-c", ONE_OF_TWO]
    environments = [os.environ | {"RANK": str(rank), "PYTHONPATH": str(ROOT)} for rank in range(2)]
    first, second = (subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for env in environments)
    second.wait()
    assert first.communicate()[0] == "peer [1]\n"


def test_a_port_that_is_taken_is_said(two):
    with pytest.raises(dist.DistNetworkError) as error, process_group(5):
        pass
    assert error.value.at_fault == "port"


@pytest.mark.parametrize(
    ("error", "at_fault"),
    [
        (ValueError("x"), None),
        (ConnectionResetError("x"), "peer"),
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:2345"), "peer"),
        (RuntimeError("Timed out waiting 12000ms for recv operation to complete"), "peer"),
        (RuntimeError("[Rank 0]: Ranks 1 failed to pass monitoredBarrier in 12000 ms"), "peer"),
        (RunError("run=runs/Connection: another job is writing this run"), None),
    ],
)
def test_whose_fault_an_error_is(error, at_fault):
    with pytest.raises(type(error)), process_group():
        raise error
    assert getattr(error, "at_fault", None) == at_fault
