"""tools/submit.py on a real Slurm."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from threading import Thread

import pytest
import torch

from slurm.state import read_state
from tests.patience import PATIENCE

ROOT = Path(__file__).parents[2]
SMALL = ["configs/digits.yaml", "model.depth=2", "model.width=32", "train.log_every=128", "train.sample_every=0"]
SHORT = [*SMALL, "train.images=1280"]
ONE = ["--nodes", "1", "--procs", "1", "--cpu"]


def local(run: Path, *options: str, config: list[str] = SHORT) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/submit.py", "--cluster", "local", *options, *config, f"run={run}"]
    return subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)


def steps(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.exists() else 0


def until(condition) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_eight_nodes_train_as_eight_local_processes(submit, wait_for_end, tensors_at, tmp_path):
    submitted = submit("--nodes", "8", "--procs", "1", "--cpu", *SHORT, f"run={tmp_path}/there")
    assert submitted.returncode == 0, submitted.stderr
    job, run, logs = re.fullmatch(r"job (\d+): run folder (.+), logs in (.+)\n", submitted.stdout).groups()
    here = local(tmp_path / "here", "--procs", "8")
    assert here.returncode == 0, here.stderr
    assert wait_for_end(Path(run)).state == "finished"
    assert sorted(read_state(Path(run)).attempts[0].hosts) == [f"node{k}" for k in range(1, 9)]
    assert {path.name for path in Path(logs).glob("?.log")} == {f"{rank}.log" for rank in range(8)}
    left = {path.name for path in Path(run).iterdir()}
    assert {"config.yaml", "state.json", "code", "logs", "checkpoints"} <= left
    assert "#SBATCH --nodes=8" in (Path(logs) / f"{job}_submission.sh").read_text()
    metrics = (tmp_path / "there/metrics.jsonl").read_text()
    assert len(metrics.splitlines()) == 10 and metrics == (tmp_path / "here/metrics.jsonl").read_text()
    found, expected = (tensors_at(tmp_path / at, 1280) for at in ("there", "here"))
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


def test_the_members_of_a_sweep_run_two_at_a_time_and_those_that_fail_leave_the_others_alone(
    submit, wait_for_end, tmp_path
):
    sweep = ["--sweep", "seed=0,1,2", "--sweep", "optim.lr=1e-3,1e30", "--parallel", "2"]
    submitted = submit(*ONE, *sweep, *SHORT, "optim.warmup=0", f"run={tmp_path}")
    assert submitted.returncode == 0, submitted.stderr
    assert re.findall(r"job \d+_(\d): ", submitted.stdout) == list("012345")
    states = {}
    for seed in range(3):
        for lr in ("1e-3", "1e30"):
            states[seed, lr] = wait_for_end(tmp_path / f"seed={seed},optim.lr={lr}")
            assert states[seed, lr].state == ("finished" if lr == "1e-3" else "failed")
    assert "not finite" in states[1, "1e30"].why and len(states[1, "1e30"].attempts) == 1, "the program's own"
    times = [(attempt.began, 1) for state in states.values() for attempt in state.attempts]
    times += [(attempt.ended, -1) for state in states.values() for attempt in state.attempts]
    running = [sum(change for _, change in sorted(times)[: i + 1]) for i in range(len(times))]
    assert max(running) == 2
    shown = submit("--status", tmp_path).stdout
    assert shown.count(": finished\n") == shown.count(": failed: ") == 3
    assert len({(tmp_path / f"seed={seed},optim.lr=1e-3/metrics.jsonl").read_text() for seed in range(3)}) == 3


def test_the_script_of_a_dry_run_is_accepted_and_nothing_is_left_of_it(submit, cluster, tmp_path):
    site = tmp_path / "site.yaml"
    site.write_text("partition: urgent\nmem: 100MB\nsetup: ['export A=\"b c\"']\nsbatch: ['--comment=x y']\n")
    for sweep in ([], ["--sweep", "seed=0,1"]):
        options = ["--nodes", "2", "--procs", "3", "--cpu", "--site", site, "--slurm", "time=7", "--slurm", "mem=200MB"]
        config = [*SMALL, "train.images=1536", "train.global_batch=384", "groups.splits=6"]
        done = submit(*options, *sweep, "--dry-run", *config, f"run={tmp_path}/it's a run")
        assert done.returncode == 0, done.stderr
        config, _, text = done.stdout.partition("#!/bin/bash\n")
        assert "width: 32" in config and "parameters" in config and "days to 1,536 images" in config
        for line in ("--partition=urgent", "--time=7", "--mem=200MB", "--nodes=2", "--ntasks-per-node=3", "--requeue"):
            assert f"#SBATCH {line}\n" in text
        assert ("#SBATCH --array=0-1%2" in text) == bool(sweep) and 'export A="b c"\n' in text
        (tmp_path / "script.sh").write_text("#!/bin/bash\n" + text)
        tested = subprocess.run(["sbatch", "--test-only", tmp_path / "script.sh"], env=cluster, capture_output=True)
        assert tested.returncode == 0, tested.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"site.yaml", "script.sh"}


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--slurm", "partition=gpu"], r"partition=gpu: not on this cluster; it has main, scratch, urgent"),
        (["--slurm", "gpus_per_node=4"], r"gpus_per_node=4: a node of partition main has 0; ask for .*--cpu"),
        (["--slurm", "partitions=main"], r"--slurm partitions=main: Extra inputs are not permitted; known are part.*"),
        (["--slurm", "time=1:00"], r"--slurm time=1:00: .*integer.*"),
        (["--slurm", "sbatch=-N3", "--cpu"], r"--slurm sbatch=-N3: write it as --name=value"),
        (["--site", "mars", "--cpu"], r"--site mars: configs/cluster/mars.yaml is no file.*"),
        (["--slurm", "time=2", "--cpu"], r"--slurm signal_delay=120: seconds, but time=2 is minutes.*"),
        (["--slurm", "exclude=node99", "--cpu"], r".*[Ii]nvalid node name.*"),
        (
            ["--nodes", "64", "--cpu", "train.global_batch=256"],
            r"--nodes 64: partition main has 8; ask for fewer",
        ),
        (["--cpu", "train.global_batch=129"], r"train.global_batch=129: .*"),
        (["--cpu", "data={name: latents, latents: /nowhere, channels: 1, side: 8}"], r".*/nowhere.*"),
        (["--cpu", "--sweep", "seed="], r"--sweep seed=: write field=value,value.*"),
        (["--cpu", "--sweep", "seed=1,x"], r"seed=x: .*"),
    ],
)
def test_what_cannot_run_is_said_before_anything_is_queued(submit, cluster, tmp_path, options, error):
    done = submit("--nodes", "2", "--procs", "1", *options, *SHORT, f"run={tmp_path}/run")
    assert done.returncode == 1
    assert re.search(f"(?m)^error: (?:{error})$", done.stderr), done.stderr
    named = ["squeue", "--noheader", f"--name=run,{tmp_path.name}"]
    assert subprocess.run(named, env=cluster, check=True, capture_output=True, text=True).stdout == ""


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--nodes", "2"], r"error: sbatch: not found .*--cluster local\n"),
        (["--nodes", "2", "--cluster", "local"], r"error: --nodes 2: --cluster local is this one machine.*\n"),
    ],
)
def test_nodes_without_slurm(options: list[str], error: str, tmp_path: Path):
    command = [sys.executable, "tools/submit.py", *options, *SHORT, "--procs", "1", f"run={tmp_path}/run"]
    env = os.environ | {"PATH": str(tmp_path)}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 1
    assert re.fullmatch(error, result.stderr)
    assert not (tmp_path / "run").exists()


def test_folders_that_nodes_cannot_see_or_nobody_can_write(submit, tmp_path):
    (tmp_path / "file").touch()
    for run, error in (
        (tmp_path / "file/run", "cannot be written"),
        (tmp_path / "50%", "a pattern"),
        (tmp_path / "10:30", "ends a path"),
    ):
        done = submit(*ONE, *SHORT, f"run={run}")
        assert done.returncode == 1 and re.fullmatch(f"error: run=.*{error}.*\n", done.stderr), done.stderr
    memory = Path("/dev/shm") / tmp_path.name
    try:
        done = submit(*ONE, *SHORT, f"run={memory}")
        assert done.returncode == 1 and "where no node sees it" in done.stderr
    finally:
        shutil.rmtree(memory, ignore_errors=True)


def test_a_cancelled_run_saves_and_goes_on_when_submitted_again(submit, wait_for_end, tensors_at, tmp_path):
    run, config = tmp_path / "my $(run) 'x'", [*SMALL, "train.images=102400", "checkpoint.every=204800"]
    config[0] = shutil.copy(config[0], tmp_path / 'it\'s $(touch hacked) `a` "config".yaml')
    assert submit(*ONE, *config, f"run={run}").returncode == 0
    again = submit(*ONE, *config, f"run={run}")
    assert again.returncode == 1 and re.search(r"its job \d+ is \w+; wait for its end, or --cancel", again.stderr)
    until(lambda: steps(run) >= 5)
    assert submit("--cancel", run).returncode == 0
    state = wait_for_end(run)
    assert state.state == "stopped" and state.why == "as asked"
    (saved,) = (path.name for path in (run / "checkpoints").iterdir())
    assert int(saved) == 128 * steps(run) < 102400
    until(lambda: submit(*ONE, *config, f"run={run}").returncode == 0)
    followed = submit("--follow", run)
    assert followed.stdout == f"finished: {run}\n" and "102k/102k" in followed.stderr
    assert local(tmp_path / "here", config=config).returncode == 0
    found, expected = (tensors_at(folder, 102400) for folder in (run, tmp_path / "here"))
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_run_that_waits_in_the_queue_is_cancelled_at_once(submit, wait_for_end, tmp_path):
    assert submit(*ONE, *SHORT, "--slurm", "sbatch=--hold", f"run={tmp_path}").returncode == 0
    assert "PENDING" in submit("--status", tmp_path).stdout
    assert submit("--cancel", tmp_path).returncode == 0
    assert wait_for_end(tmp_path).state == "stopped"
    until(lambda: "not in the queue" in submit("--status", tmp_path).stdout)


def test_one_member_of_a_sweep_is_requeued_and_leaves_the_others_alone(submit, wait_for_end, tmp_path):
    """Also the one whose number is that of the whole array."""
    config = [*SMALL, "train.images=102400", f"run={tmp_path}"]
    assert submit(*ONE, "--sweep", "seed=0,1", *config).returncode == 0
    runs = [tmp_path / f"seed={seed}" for seed in (0, 1)]
    for run in runs:
        until(lambda run=run: steps(run) >= 5)
        tasks = [process for process in Path("/proc").glob("[0-9]*") if is_task(process, run)]
        for process in tasks:
            os.kill(int(process.name), signal.SIGUSR2)
        until(lambda run=run: read_state(run).attempts[0].outcome == "stopped")
    for run in runs:
        assert wait_for_end(run).state == "finished"
        assert [attempt.outcome for attempt in read_state(run).attempts] == ["stopped", "finished"]


def test_a_site_that_cancels_what_it_preempts_and_passes_no_environment_on(submit, cluster, wait_for_end, tmp_path):
    """The second time, a task does not save before it is killed."""
    site = ["--slurm", "partition=scratch", "--slurm", "sbatch=--export=NONE", "--slurm", "sbatch=--nodelist=node[7-8]"]
    config = [*SMALL, "train.images=25600", "checkpoint.every=25600"]
    done = submit("--nodes", "2", "--procs", "1", "--cpu", *site, *config, f"run={tmp_path}")
    assert done.returncode == 0, done.stderr
    urgent = ["sbatch", "--partition=urgent", "--nodelist=node[7-8]", "--ntasks-per-node=8", "--output=/dev/null"]

    def saved():
        return [int(path.name) for path in (tmp_path / "checkpoints").glob("*") if path.name.isdigit()]

    until(lambda: steps(tmp_path) > 5 or read_state(tmp_path).ended)
    subprocess.run([*urgent, "--wrap=sleep 1"], env=cluster, check=True, capture_output=True)
    until(lambda: saved() and len(read_state(tmp_path).attempts) == 2 and steps(tmp_path) > saved()[0] // 128 + 5)
    frozen = Thread(target=freeze, args=[next(p for p in Path("/proc").glob("[0-9]*") if is_task(p, tmp_path))])
    frozen.start()
    subprocess.run([*urgent, "--wrap=sleep 1"], env=cluster, check=True, capture_output=True)
    frozen.join()
    state = wait_for_end(tmp_path)
    assert [attempt.outcome for attempt in state.attempts] == ["stopped", "lost", "finished"], state
    assert len(saved()) == 2, "where it was stopped, and at the end"


def freeze(process):
    """Again and again, as Slurm wakes what it ends; until it is gone."""
    with suppress(ProcessLookupError):
        for _ in range(round(PATIENCE / 0.01)):
            os.kill(int(process.name), signal.SIGSTOP)
            time.sleep(0.01)


def is_task(process, run):
    try:
        command = (process / "cmdline").read_text().split("\0")
    except OSError:
        return False
    return "slurm.task" in command and command[0] != "srun" and any(part.startswith(f"{run}/") for part in command)


def test_what_sbatch_refuses_and_who_runs_it_here_as_well_leave_a_run_as_it_was(submit, cluster, tmp_path):
    assert local(tmp_path / "run").returncode == 0
    before = (tmp_path / "run/state.json").read_text()
    refused = submit(*ONE, *SHORT, f"run={tmp_path}/run", "--slurm", "exclude=node99")
    assert refused.returncode == 1 and "error: sbatch: error: " in refused.stderr, refused.stderr
    assert (tmp_path / "run/state.json").read_text() == before
    assert submit(*ONE, *SHORT, "--slurm", "sbatch=--hold", f"run={tmp_path}/held").returncode == 0
    job = (tmp_path / "held/job").read_text().strip()
    before = (tmp_path / "held/state.json").read_text()
    here = submit("--cluster", "local", "--procs", "1", *SHORT, f"run={tmp_path}/held")
    assert here.returncode == 1 and f"its job {job} is pending; wait for its end" in here.stderr
    assert (tmp_path / "held/state.json").read_text() == before
    subprocess.run(["scancel", job], env=cluster, check=True)
    until(lambda: "not in the queue" in submit("--status", tmp_path / "held").stdout)
    followed = submit("--follow", tmp_path / "held")
    assert followed.returncode == 1 and "its supervisor has ended without a word" in followed.stderr
