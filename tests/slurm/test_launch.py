"""Launching processes on this machine."""

import io
import signal
import time

import pytest

from slurm import launch
from slurm.errors import LaunchError


def run(tmp_path, function, tasks):
    return launch.follow(launch.submit_here(tmp_path, tasks, 0, function), out=io.StringIO())


def test_every_process_knows_its_place(tmp_path):
    def places():
        import os

        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
        return [os.environ[name] for name in names]

    assert run(tmp_path, places, 3) == ["0", "3", "0", "3", "127.0.0.1"]


@pytest.mark.parametrize("interrupts", [signal.default_int_handler, signal.SIG_IGN], ids=["heard", "ignored"])
def test_a_process_that_fails_ends_those_that_would_wait_for_it(tmp_path, monkeypatch, request, interrupts):
    def one_fails():
        import os
        import time

        if os.environ["RANK"] == "1":
            raise ValueError("of rank 1")
        time.sleep(300)

    monkeypatch.setattr(launch, "PATIENCE", 1.0)
    before = signal.signal(signal.SIGINT, interrupts)  # ignored: as in a job that a shell began with `&`
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    start = time.monotonic()
    with pytest.raises(LaunchError, match=r"^ValueError: of rank 1 \(task 1; logs in "):
        run(tmp_path, one_fails, 2)
    assert time.monotonic() - start < 60


def test_gpus_that_the_user_chose_stay_chosen(tmp_path, monkeypatch):
    def visible():
        import os

        return os.environ["CUDA_VISIBLE_DEVICES"]

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    assert run(tmp_path, visible, 1) == "4,5"
