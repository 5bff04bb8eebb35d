"""Supervised tasks on this machine: real processes that fail, hang and are told to stop."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import cloudpickle
import pytest
import torch

from slurm import health, supervise, tasks
from slurm.control import lost_or_ended, note_job
from slurm.health import NodeError, check_node
from slurm.options import ClusterOptions
from slurm.records import read_records
from slurm.snapshot import ROOT, python_path, take_snapshot
from slurm.state import RunState, read_state, write_state
from slurm.supervise import STOP, Job, RunFailed
from slurm.tasks import free_port


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A job of processes here that call a function."""
    monkeypatch.setattr(tasks, "PATIENCE", 2.0)
    old = {number: signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)}

    def make(function, number=2, retries=3):
        logs = tmp_path / "logs"
        logs.mkdir()
        (logs / "task.pkl").write_bytes(cloudpickle.dumps((function, ())))
        write_state(tmp_path, RunState(logs=str(logs)))
        return Job(tmp_path, logs, ROOT, tmp_path / "lock", retries, False, tasks=number)

    yield make
    for number, handler in old.items():
        signal.signal(number, handler)


def finish(stop_requested):
    return "finished"


def fail_once(stop_requested):
    """Rank 1 fails at first; the other would wait for it."""
    import os
    import time
    from pathlib import Path

    if os.environ["RANK"] == "1" and not Path(os.environ["MARK"]).exists():
        Path(os.environ["MARK"]).touch()
        while not Path(os.environ["MARK"] + "2").exists():
            time.sleep(0.05)
        raise ValueError("a bad day\nof rank 1")
    if os.environ["RANK"] == "0" and not Path(os.environ["MARK"] + "2").exists():
        Path(os.environ["MARK"] + "2").touch()
        time.sleep(300)
    return "finished"


def fail_always(stop_requested):
    error = ValueError("the program's own")
    error.step = 7
    raise error


def wait_for_stop(stop_requested):
    import time

    while not stop_requested():
        time.sleep(0.01)
    return "stopped"


def test_a_run_that_finishes(job):
    made = job(finish, 3)
    assert supervise.supervise(made) == "finished"
    assert [record.outcome for record in read_records(made.logs).values()] == ["finished"] * 3
    assert read_state(made.run).state == "finished"


def test_the_tasks_start_again_after_a_failure_and_those_that_would_wait_are_ended(job, tmp_path, monkeypatch):
    monkeypatch.setenv("MARK", str(tmp_path / "mark"))
    begun = time.monotonic()
    assert supervise.supervise(job(fail_once)) == "finished"
    assert time.monotonic() - begun < 60
    first, second = read_state(tmp_path).attempts
    assert first.outcome == "failed" and first.host == socket.gethostname() and second.outcome == "finished"
    assert first.why.startswith("ValueError: a bad day (rank 1 on ")


def test_a_failure_that_comes_twice_in_the_same_step_is_the_programs_own(job, tmp_path):
    with pytest.raises(
        RunFailed, match=r"^twice in step 7: ValueError: the program's own \(rank \d on .* in step 7; log"
    ):
        supervise.supervise(job(fail_always))
    state = read_state(tmp_path)
    assert state.state == "failed" and len(state.attempts) == 2


def test_without_retries_it_fails_at_once(job, tmp_path):
    with pytest.raises(RunFailed, match=r"^1 failures; the last: ValueError"):
        supervise.supervise(job(fail_always, retries=0))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_a_signal_to_the_supervisor_stops_the_tasks(job, number):
    made = job(wait_for_stop)
    code = "import pickle, sys; from slurm.supervise import supervise; print(supervise(pickle.load(sys.stdin.buffer)))"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdin.write(cloudpickle.dumps(made))
    process.stdin.close()
    while len(read_records(made.logs)) < 2:
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(60) == 0 and process.stdout.read() == b"stopped\n"
    assert read_state(made.run).state == "stopped"


def test_a_run_that_shall_stop_does_not_start(job):
    made = job(finish)
    (made.run / STOP).touch()
    assert supervise.supervise(made) == "stopped"
    assert read_state(made.run).attempts == []


def test_a_port_in_use_on_any_address_is_not_taken(monkeypatch):
    with socket.socket() as four, socket.socket(socket.AF_INET6) as six:
        four.bind(("127.0.0.1", 0))
        six.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        six.bind(("::1", 0))
        four.listen()
        six.listen()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            free = probe.getsockname()[1]
        ports = iter([four.getsockname()[1], six.getsockname()[1], free])
        monkeypatch.setattr("random.SystemRandom.randrange", lambda *_: next(ports))
        assert free_port() == free


def test_a_node_is_named_that_has_no_room_or_another_time(tmp_path, monkeypatch):
    check_node(tmp_path)
    monkeypatch.setenv("TMPDIR", "/scratch/of/the/login/node")
    check_node(tmp_path)
    monkeypatch.setenv(tasks.GPUS, str(torch.cuda.device_count() + 1))
    with pytest.raises(NodeError, match=r"\d of its \d GPUs can be used"):
        check_node(tmp_path)
    monkeypatch.delenv(tasks.GPUS)
    monkeypatch.setattr(health, "FREE_BYTES", 1 << 60)
    with pytest.raises(NodeError, match=rf"^{socket.gethostname()}: {tmp_path} has .* GiB free"):
        check_node(tmp_path)
    monkeypatch.setattr(health, "FREE_BYTES", 0)
    now = time.time()
    monkeypatch.setattr(health.time, "time", lambda: now - 500)
    with pytest.raises(NodeError, match=rf"^{socket.gethostname()}: its clock is -\d+ s from"):
        check_node(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_snapshot_is_what_runs(tmp_path):
    snapshot = take_snapshot(tmp_path / "code")
    (snapshot / "trainer/errors.py").write_text("MARK = 'of the snapshot'")
    code = "import trainer.errors; print(trainer.errors.MARK)"
    env = os.environ | {"PYTHONPATH": python_path(snapshot)}
    done = subprocess.run([sys.executable, "-P", "-c", code], env=env, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "of the snapshot\n", done.stderr
    assert {path.name for path in snapshot.iterdir()} == {"data", "models", "slurm", "trainer"}
    assert not list(snapshot.rglob("__pycache__")) and not Path(f"{snapshot}.partial").exists()


def test_options_of_the_command_line_go_over_those_of_the_site():
    from slurm.sbatch import sbatch_parameters

    made = sbatch_parameters(ClusterOptions(reservation="r", sbatch=["--exclusive"]), "x", 2, 4, 0)
    assert made["additional_parameters"] == {"requeue": True, "reservation": "r", "exclusive": True}
    assert made["gpus_per_node"] is None and made["ntasks_per_node"] == 4


def test_who_follows_a_run_whose_process_was_killed_is_not_kept_waiting(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)", "submitit"])
    write_state(tmp_path, RunState(state="running", logs=str(tmp_path)))
    note_job(tmp_path, str(process.pid), "local")
    ended = lost_or_ended(tmp_path)
    while b"submitit" not in Path(f"/proc/{process.pid}/cmdline").read_bytes():  # it has only just begun
        time.sleep(0.01)
    assert not ended()
    process.kill()
    process.wait()
    assert ended()
    (tmp_path / "job").write_text(f"local {process.pid} another-machine")
    assert not ended()
