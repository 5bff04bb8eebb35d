"""Random faults at random times on a real Slurm: `python tests/slurm/soak.py [--faults 20] [--seed 0]`, by hand.

One long run of 2 nodes x 2 tasks on a cluster of 4 nodes meets the faults one after another; then its losses and
weights are compared with those of the same run without faults. Prints a line per fault and a summary; the exit code is
1 if a run hangs, loses more steps than it may, or ends otherwise than without faults.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from slurm.state import describe, read_state  # noqa: E402

CLUSTER = ROOT / "tests/slurm/cluster.sh"
BATCH, INTERVAL = 128, 20
CONFIG = ["configs/digits.yaml", "model.depth=1", "model.width=24", "model.heads=2", "train.sample_every=0"]
CONFIG += [f"train.log_every={BATCH}", f"checkpoint.every={BATCH * INTERVAL}", "checkpoint.keep=2"]
SIGNALLED = {"SIGUSR2", "SIGTERM", "preemption"}
FAULTS = [*sorted(SIGNALLED), "SIGKILL", "requeue", "lost node", "slurmctld"]
PATIENCE = 240.0  # seconds without a new step that count as a hang


class Soak:
    """The run and its cluster."""

    def __init__(self, folder: Path, steps: int, rng: random.Random) -> None:
        self.run, self.rng, self.env = folder / "run", rng, os.environ | {"SLURM_TEST_DIR": str(folder / "slurm")}
        self.lost: str | None = None
        subprocess.run([CLUSTER, "up", "4"], env=self.env, check=True)
        shown = subprocess.run([CLUSTER, "env"], env=self.env, check=True, capture_output=True, text=True).stdout
        self.env |= dict(line.split("=", 1) for line in shown.splitlines())
        options = ["--nodes", "2", "--procs", "2", "--cpu", "--slurm", "retries=1000"]
        command = [sys.executable, "tools/submit.py", *options, *CONFIG, f"run={self.run}"]
        self.began = time.monotonic()
        done = subprocess.run(
            [*command, f"train.images={BATCH * steps}"],
            cwd=ROOT,
            env=self.env,
            check=True,
            capture_output=True,
            text=True,
        )
        self.job = done.stdout.split()[1].rstrip(":")

    def steps(self) -> int:
        metrics = self.run / "metrics.jsonl"
        return metrics.read_text().count("\n") if metrics.exists() else 0

    def attempts(self) -> int:
        return len(read_state(self.run).attempts)

    def tasks(self) -> dict[int, tuple[int, str]]:
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                command = (process / "cmdline").read_text().split("\0")
                env = dict(line.split("=", 1) for line in (process / "environ").read_text().split("\0") if "=" in line)
                stopped = "State:\tT" in (process / "status").read_text()
            except (OSError, UnicodeDecodeError):
                continue
            if command[0] == "srun" or "slurm.task" not in command or "SLURM_PROCID" not in env or stopped:
                continue
            if env["SLURM_JOB_ID"] == self.job:
                found[int(env["SLURM_PROCID"])] = (int(process.name), env["SLURMD_NODENAME"])
        return found

    def strike(self, fault: str) -> None:
        pid, host = self.rng.choice(sorted(self.tasks().values()))
        if fault.startswith("SIG"):
            os.kill(pid, getattr(signal, fault))
        elif fault == "requeue":
            subprocess.run(["scontrol", "requeue", self.job], env=self.env, check=True)
        elif fault == "preemption":
            hosts = ",".join(read_state(self.run).attempts[-1].hosts)
            options = ["--partition=urgent", f"--nodelist={hosts}", "--ntasks-per-node=8", "--output=/dev/null"]
            subprocess.run(["sbatch", *options, "--wrap=sleep 1"], env=self.env, check=True, capture_output=True)
        elif fault == "lost node":
            subprocess.run([CLUSTER, "lose", host], env=self.env, check=True)
            self.lost = host
        else:
            subprocess.run([CLUSTER, "restart"], env=self.env, check=True)

    def revive(self) -> None:
        if self.lost:
            subprocess.run([CLUSTER, "revive", self.lost], env=self.env, check=True)
            self.lost = None


def wait(condition: Callable[[], bool], seconds: float = PATIENCE) -> bool:
    """False if it did not come true in time: a hang."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def strike_and_watch(soak: Soak, number: int) -> tuple[str, int, float] | None:
    """One fault: (which, steps lost, seconds until it trains again). None if the run hangs."""
    fault, when = soak.rng.choice(FAULTS), soak.steps() + soak.rng.randrange(3, 40)
    if not wait(lambda: soak.steps() >= when and len(soak.tasks()) == 4):
        return None
    attempts, struck = soak.attempts(), time.time()
    soak.strike(fault)
    if fault == "slurmctld":
        reached, steps = 0, 0  # the run does not notice
    else:
        if not wait(lambda: soak.attempts() > attempts):
            return None
        steps, reached = soak.steps(), newest_checkpoint(soak.run)  # from which the new start resumes
        if not wait(lambda: soak.steps() != steps):
            return None
    seconds, lost = time.time() - struck, steps - reached
    ended = (read_state(soak.run).attempts[attempts - 1].ended or struck) - struck
    ended_after = f"ended after {ended:.1f} s, " * (ended > 0)
    print(
        f"{number:3} {fault:11} after step {steps:5}: {ended_after}{lost} lost, again after {seconds:.1f} s", flush=True
    )
    soak.revive()
    return fault, lost, seconds


def main() -> int:
    """Strike, wait for the end, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    steps = 60 * args.faults + 200
    results: dict[str, list[tuple[int, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            soak = Soak(folder, steps, random.Random(args.seed))
            hangs = int(not wait(lambda: soak.steps() >= 1))
            print(f"first step {time.monotonic() - soak.began:.1f} s after it was submitted")
            for number in range(1, args.faults + 1):
                result = strike_and_watch(soak, number)
                if result is None:
                    hangs += 1
                    break
                results.setdefault(result[0], []).append(result[1:])
            hangs += int(not wait(lambda: read_state(soak.run).ended, 600))
            state = read_state(soak.run)
            print(describe(soak.run, state).splitlines()[0])
            different = state.state != "finished" or differs(soak.run, folder / "undisturbed", steps)
        finally:
            env = os.environ | {"SLURM_TEST_DIR": str(folder / "slurm")}
            subprocess.run([CLUSTER, "down"], env=env, check=True)
    too_many = 0
    for fault, found in sorted(results.items()):
        lost, seconds = [one[0] for one in found], [one[1] for one in found]
        too_many += sum(number > (1 if fault in SIGNALLED else INTERVAL) for number in lost)
        print(
            f"{fault:11} {len(found)} times: {max(lost)} steps lost at most, {min(seconds):.0f} to {max(seconds):.0f} s"
        )
    print(f"{sum(map(len, results.values()))} faults, {hangs} hangs, {too_many} lost too much, different: {different}")
    return int(bool(hangs or too_many or different))


def newest_checkpoint(run: Path) -> int:
    """The steps that it holds."""
    checkpoints = sorted(int(path.name) for path in (run / "checkpoints").glob("????????????"))
    return checkpoints[-1] // BATCH if checkpoints else 0


def differs(run: Path, undisturbed: Path, steps: int) -> bool:
    """Whether losses or weights differ from those of a run without faults."""
    command = [sys.executable, "tools/submit.py", "--cluster", "local", "--procs", "4", *CONFIG, f"run={undisturbed}"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*command, f"train.images={BATCH * steps}"], cwd=ROOT, env=env, check=True, capture_output=True)
    states = []
    for folder in (run, undisturbed):
        checkpoint = folder / f"checkpoints/{BATCH * steps:012d}"
        stored = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
        state = {k: torch.empty(m.size) for k, m in stored.items() if isinstance(m, TensorStorageMetadata)}
        dcp.load(state, checkpoint_id=checkpoint)
        states.append(state)
    same_losses = (run / "metrics.jsonl").read_text() == (undisturbed / "metrics.jsonl").read_text()
    return not same_losses or any(not torch.equal(states[0][key], states[1][key]) for key in states[0])


if __name__ == "__main__":
    sys.exit(main())
