"""An ablation as a job array of a real Slurm."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
SETTINGS = ["train.images=64", "groups.size=4", "groups.splits=4", "sample.per_class=2"]
AXES = ["--axis", "groups.size=1,4", "--seeds", "2", "--guidance", "1,2"]


def ablate(out: Path, *options: object, env: dict[str, str]) -> str:
    command = ["tools/ablate.py", "tests/trainer/tiny.yaml", *SETTINGS, *AXES, "--out", out, *options]
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_job_array_makes_the_table_that_one_process_makes(
    cluster: dict[str, str], assert_completes: Callable[[str, Path], None], tmp_path: Path
):
    submitted = ablate(tmp_path / "there", "--nodes", 2, "--procs", 1, "--cpu", env=cluster)
    jobs, logs = re.match(r"jobs (\d+_0 \d+_1): logs in (.+)\n", submitted).groups()
    assert submitted.endswith("4 of 4 runs are missing; the same command resumes them\n")
    for job in jobs.split():
        assert_completes(job, Path(logs))
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    said = [ablate(tmp_path / at, env=one_thread) for at in ("there", "here")]  # the first has all its runs
    assert said[0] == said[1] and said[0].count("`groups.size`") == 2
    contents = [(tmp_path / at / "ablation.json").read_bytes() for at in ("there", "here")]
    assert contents[0] == contents[1]
