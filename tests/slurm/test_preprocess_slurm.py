"""The preprocessing tools as job arrays of a real Slurm."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from data.stores.store import Store, read_manifest

ROOT = Path(__file__).parents[2]


def tool(name: str, *arguments: object, env: dict[str, str]) -> subprocess.CompletedProcess:
    command = [sys.executable, f"tools/{name}.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def images_and_vae(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("preprocess")
    rng = np.random.default_rng(0)
    for i in range(40):
        path = folder / f"images/class{i % 2}/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(256, size=(40, 50, 3), dtype=np.uint8)).save(path)
    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=8,
    ).save_pretrained(folder / "vae")
    return folder / "images", folder / "vae"


def test_a_job_array_makes_the_shards_that_one_process_makes(
    cluster: dict[str, str],
    assert_completes: Callable[[str, Path], None],
    images_and_vae: tuple[Path, Path],
    tmp_path: Path,
):
    images, vae = images_and_vae
    options = ["--images", images, "--vae", vae, "--size", 32, "--shard-size", 4, "--batch", 2, "--workers", 0]
    options += ["--precision", "fp32", "--dtype", "float32"]
    (tmp_path / "site.yaml").write_text("tasks_per_node: 2\ncpus_per_task: 2\n")
    where = ["--nodes", 2, "--cpu", "--site", tmp_path / "site.yaml"]
    submitted = tool("precompute_latents", *options, "--out", tmp_path / "there", *where, env=cluster)
    assert submitted.returncode == 0, submitted.stderr
    jobs, logs = re.fullmatch(r"jobs (\d+_0 \d+_1): logs in (.+)\n", submitted.stdout).groups()
    for job in jobs.split():
        assert_completes(job, Path(logs))
    assert len(list(Path(logs).glob("*_log.out"))) == 4, "two processes on each of two nodes"
    script = next(Path(logs).glob("*.sh")).read_text()
    assert "#SBATCH --cpus-per-task=2\n" in script and re.search("srun .*--cpus-per-task=2 ", script)

    here = tool("precompute_latents", *options, "--out", tmp_path / "here", env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert here.returncode == 0, here.stderr
    verified = tool("precompute_latents", *options, "--out", tmp_path / "there", "--verify", env=os.environ.copy())
    assert verified.returncode == 0, verified.stdout
    stores = [Store(tmp_path / at, read_manifest(tmp_path / at, "latents", "")) for at in ("here", "there")]
    assert np.array_equal(*(store.index["key"] for store in stores))
    moments = [store.read("moments", np.arange(40)) for store in stores]
    np.testing.assert_allclose(*moments, rtol=0, atol=1e-5)
    shards = [json.loads((tmp_path / at / "manifest.json").read_text())["shards"] for at in ("here", "there")]
    assert len(shards[0]) == len(shards[1]) == 10
