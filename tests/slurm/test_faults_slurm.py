"""A run that nothing stops: each fault, on a real Slurm, leaves the losses and weights of a run without it.

The faults happen to runs of 2 nodes x 2 tasks side by side; all are the same run, except for a longer one that reaches
its time limit.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from slurm.state import find_state, read_state
from tests.patience import PATIENCE

ROOT = Path(__file__).parents[2]
CLUSTER = str(ROOT / "tests/slurm/cluster.sh")
CONFIG = ["configs/digits.yaml", "model.depth=1", "model.width=24", "model.heads=2", "train.sample_every=0"]
CONFIG += ["train.log_every=128", "checkpoint.every=2560", "checkpoint.keep=99"]
STEPS, LONG = 120, 300
NODES = ["--nodes", "2", "--procs", "2", "--cpu"]
AWAY = ["--slurm", "exclude=node[1-2]"]  # where only the preempted run is
RUNS = {
    "lost node": [*AWAY, "--slurm", "sbatch=--exclusive"],
    "time limit": [*AWAY, "--slurm", "time=6", "--slurm", "signal_delay=315"],
    "preemption": ["--slurm", "sbatch=--nodelist=node[1-2]"],
    "signals": AWAY,
    "requeue": AWAY,
    "bad host": AWAY,
    "hang": AWAY,
}


class Faults:
    """The runs, and what is done to them."""

    def __init__(self, folder: Path, cluster: dict[str, str], submit: Callable) -> None:
        self.folder, self.env, self._submit = folder, cluster, submit
        self.jobs: dict[str, str] = {}

    def run(self, name: str) -> Path:
        return self.folder / f"it's $(touch hacked) {name}"

    def start(self, name: str, root: Path = ROOT, env: dict[str, str] | None = None) -> None:
        steps = LONG if name == "time limit" else STEPS
        changes = [f"run={self.run(name)}", f"train.images={128 * steps}"] + ["train.timeout=60"] * (name == "hang")
        changes += [f"checkpoint.every={128 * steps}"] * (name == "preemption")  # at the stop and the end
        done = self._submit(*NODES, *RUNS[name], *CONFIG, *changes, root=root, env=env or self.env)
        assert done.returncode == 0, done.stderr
        self.jobs[name] = re.match(r"job (\d+):", done.stdout)[1]

    def steps(self, name: str) -> int:
        metrics = self.run(name) / "metrics.jsonl"
        return metrics.read_text().count("\n") if metrics.exists() else 0

    def tasks(self, name: str) -> dict[int, tuple[int, str]]:
        """The processes of a run's ranks: rank -> (pid, host)."""
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                command = (process / "cmdline").read_text().split("\0")
                text = (process / "environ").read_text().split("\0")
            except (OSError, UnicodeDecodeError):
                continue
            env = dict(line.split("=", 1) for line in text if "=" in line)
            if command[0] == "srun" or "slurm.task" not in command or "SLURM_PROCID" not in env:
                continue
            if env["SLURM_JOB_ID"] == self.jobs.get(name):
                found[int(env["SLURM_PROCID"])] = (int(process.name), env["SLURMD_NODENAME"])
        return found

    def slurm(self, *command: str) -> None:
        subprocess.run(command, env=self.env, check=True, capture_output=True, timeout=100)


@pytest.fixture(scope="module")
def faults(cluster, submit, tmp_path_factory, wait_for_end):
    faults = Faults(tmp_path_factory.mktemp("faults"), cluster, submit)
    copy = faults.folder / "copy of the code"
    for part in ("data", "models", "slurm", "trainer", "tools", "configs"):
        shutil.copytree(ROOT / part, copy / part)

    def start_all():
        for name in RUNS:
            if name == "requeue":
                faults.start(name, copy, faults.env | {"PYTHONPATH": str(copy)})
            else:
                faults.start(name)

    def signal_tasks(name, *numbers):
        for (pid, _), number in zip(faults.tasks(name).values(), numbers, strict=False):
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(pid, number)

    def lose_node():
        faults.slurm(CLUSTER, "lose", read_state(faults.run("lost node")).attempts[0].hosts[1])

    def preempt():
        options = ["--partition=urgent", "--nodelist=node[1-2]", "--ntasks-per-node=8", "--output=/dev/null"]
        faults.slurm("sbatch", *options, "--wrap=sleep 3")

    def requeue():
        (copy / "trainer/loop.py").write_text("raise SystemExit('this is not the code that was submitted')")
        faults.slurm("scontrol", "requeue", faults.jobs["requeue"])

    def stopped_once(name):
        state = find_state(faults.run(name))
        return state is not None and any(attempt.outcome == "stopped" for attempt in state.attempts)

    def extend():
        faults.slurm("scontrol", "update", f"JobId={faults.jobs['time limit']}", "TimeLimit=60")

    def steps(number, attempt=1):
        def reached(name):
            if faults.steps(name) < number or len(read_state(faults.run(name)).attempts) != attempt:
                return False
            return len(faults.tasks(name)) == 4

        return reached

    def started(name):
        return len(list(faults.run(name).glob("logs/*/records/?.json"))) == len(faults.tasks(name)) == 4

    def saving(name):
        return any((faults.run(name) / "checkpoints").glob("*.incomplete")) and steps(9, 2)(name)

    def kill_on_host(name):
        host = read_state(faults.run(name)).attempts[0].hosts[1]
        pid = next(pid for pid, its in faults.tasks(name).values() if its == host)
        os.kill(pid, signal.SIGKILL)

    def to_tasks(*numbers):
        return lambda name: signal_tasks(name, *numbers)

    plan = [  # (run, when, what); those of one run in this order
        ("lost node", steps(15), lambda _: lose_node()),
        ("preemption", steps(10), lambda _: preempt()),
        ("time limit", stopped_once, lambda _: extend()),  # for the rest
        ("signals", started, to_tasks(signal.SIGTERM)),  # before the first step
        ("signals", saving, to_tasks(signal.SIGTERM)),
        ("signals", steps(35, 3), to_tasks(signal.SIGUSR2, signal.SIGTERM, signal.SIGUSR2)),
        ("signals", lambda name: faults.steps(name) == STEPS, to_tasks(signal.SIGUSR2)),
        ("requeue", steps(12), to_tasks(signal.SIGUSR2)),  # to one task
        ("requeue", steps(25, 2), lambda _: requeue()),
        ("requeue", steps(45, 3), lambda _: faults.slurm(CLUSTER, "restart")),
        ("bad host", steps(10), kill_on_host),
        ("bad host", steps(35, 2), kill_on_host),
        ("hang", steps(18), lambda name: os.kill(faults.tasks(name)[2][0], signal.SIGSTOP)),
    ]
    submitting = ThreadPoolExecutor(1).submit(start_all)
    end = time.monotonic() + PATIENCE
    while plan:
        assert time.monotonic() < end, [name for name, _, _ in plan]
        if submitting.done():
            submitting.result()
        for fault in list(plan):
            name, when, what = fault
            first = next(other for other in plan if other[0] == name)
            if fault is first and when(name):
                print(f"{time.strftime('%X')} {name} at {faults.steps(name)}", file=sys.stderr)
                what(name)
                plan.remove(fault)
        time.sleep(0.05)
    for name in RUNS:
        wait_for_end(faults.run(name))
    faults.slurm(CLUSTER, "revive", read_state(faults.run("lost node")).attempts[0].hosts[1])  # for other tests
    return faults


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    run = tmp_path_factory.mktemp("undisturbed")
    command = [sys.executable, "tools/submit.py", "--cluster", "local", "--procs", "4", *CONFIG, f"run={run}"]
    done = subprocess.run(
        [*command, f"train.images={128 * LONG}"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return run


@pytest.mark.parametrize("name", RUNS)
def test_after_the_fault_the_run_ends_as_one_without(faults, undisturbed, tensors_at, name):
    run, steps = faults.run(name), LONG if name == "time limit" else STEPS
    state = read_state(run)
    assert state.state == "finished", state
    rows = (run / "metrics.jsonl").read_text().splitlines()
    assert rows == (undisturbed / "metrics.jsonl").read_text().splitlines()[:steps]
    found, expected = tensors_at(run, 128 * steps), tensors_at(undisturbed, 128 * steps)
    assert found.keys() == expected.keys() and any(key.startswith("ema.") for key in found)
    assert all(torch.equal(found[key], expected[key]) for key in found)
    assert not list(faults.folder.rglob("hacked")) and not (ROOT / "hacked").exists()


def outcomes(faults, name):
    return [attempt.outcome for attempt in read_state(faults.run(name)).attempts]


def test_each_fault_was_met_in_its_way(faults):
    assert outcomes(faults, "signals")[:4] == ["stopped", "stopped", "stopped", "finished"]
    assert outcomes(faults, "preemption") == ["stopped", "finished"]
    assert outcomes(faults, "time limit") == ["stopped", "finished"]
    requeued = outcomes(faults, "requeue")
    assert requeued in (["stopped", "lost", "finished"], ["stopped", "stopped", "finished"]), "as SIGTERM comes in time"
    assert outcomes(faults, "lost node") == ["lost", "finished"]
    assert outcomes(faults, "hang")[0] == "failed"
    assert outcomes(faults, "bad host")[:2] == ["failed", "failed"]


def test_the_rank_the_host_and_the_cause_of_a_failure_are_named(faults):
    killed = read_state(faults.run("bad host")).attempts[0]
    assert (
        re.search(r"Killed .*rank [23] on (node\d) .*log .*[23]\.log", killed.why)[1] == killed.host == killed.hosts[1]
    )
    hung = read_state(faults.run("hang")).attempts[0]
    assert re.match("did not answer .*rank 2 on ", hung.why) and hung.host == hung.hosts[1]


def test_a_host_that_failed_twice_is_left_out(faults):
    state = read_state(faults.run("bad host"))
    bad = state.attempts[0].hosts[1]
    failed = [attempt for attempt in state.attempts if attempt.outcome == "failed"]
    assert [attempt.host for attempt in failed if attempt.step is not None] == [bad, bad], "the two that were killed"
    # Slurm may kill a step on its own account as well: that counts for its host, once
    assert state.host_failures == Counter(attempt.host for attempt in failed)
    assert state.excluded == [host for host, number in state.host_failures.items() if number >= 2] == [bad]
    assert bad not in state.attempts[2].hosts


def test_what_was_done_before_a_signal_is_not_done_again(faults):
    run = faults.run("preemption")
    stopped, end = sorted((run / "checkpoints").iterdir())
    assert 0 < int(stopped.name) < int(end.name) == 128 * STEPS
    logs = [path.read_text() for path in (run / "logs").rglob("*.log")]
    assert sum(f"continuing from {stopped}" in log for log in logs) == 1
