"""Real ranks: processes that train tiny runs on the digits, and what they leave behind."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from slurm.tasks import free_port
from tests.patience import PATIENCE
from tests.stores import encoded, noise, sample, write, write_tar
from tests.trainer.forked import TINY, Forked, train_tiny
from trainer.ranks import process_group

HERE = Path(__file__).parent


class Launcher:
    """Starts the ranks of runs; whatever still lives at the end of the test is killed."""

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen] = []

    def start(self, world_size: int, *runs: list[str], script: str = "train_many.py") -> list[subprocess.Popen]:
        ports = [free_port() for _ in runs]
        command = [sys.executable, str(HERE / script), str(TINY), json.dumps(runs), json.dumps(ports)]
        started = []
        for rank in range(world_size):
            world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size}
            world |= {"LOCAL_WORLD_SIZE": world_size, "OMP_NUM_THREADS": 1}
            env = os.environ | {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in world.items()}
            started.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
        self.processes += started
        return started

    def run(self, world_size: int, *runs: list[str], script: str = "train_many.py") -> str:
        """Run to the end; the stderr of rank 0."""
        code, errors = self.finish(self.start(world_size, *runs, script=script))
        assert code == 0, errors
        return errors

    def finish(self, processes: list[subprocess.Popen]) -> tuple[int, str]:
        """(exit code, stderr) of rank 0 once all have ended."""
        errors: list[str] = []
        for process in processes:
            try:
                errors.append(process.communicate(timeout=PATIENCE)[1])
            except subprocess.TimeoutExpired:
                raise AssertionError(f"rank {len(errors)} does not end; what the others said: {errors}") from None
        return processes[0].returncode, errors[0]

    def signal(self, processes: list[subprocess.Popen], number: int) -> None:
        for process in processes:
            process.send_signal(number)


def _launcher():
    launcher = Launcher()
    yield launcher
    launcher.signal([p for p in launcher.processes if p.poll() is None], signal.SIGKILL)


launcher = pytest.fixture(_launcher)
module_launcher = pytest.fixture(_launcher, scope="module")


@pytest.fixture(scope="session")
def metrics():
    """Rows of a run's metrics.jsonl."""
    return lambda run: [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def tensors():
    """All tensors of a checkpoint by name, read without a process group."""

    def read(checkpoint: Path) -> dict[str, torch.Tensor]:
        stored = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
        state = {k: torch.empty(m.size) for k, m in stored.items() if isinstance(m, TensorStorageMetadata)}
        dcp.load(state, checkpoint_id=checkpoint)
        return state

    return read


@pytest.fixture(scope="session")
def tiny():
    return TINY


@pytest.fixture(scope="module")
def vae(save_vae):
    return save_vae()


@pytest.fixture(scope="module")
def encoder(save_encoder):
    return save_encoder("clip")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """24 images in three class folders."""
    root = tmp_path_factory.mktemp("plain")
    for i in range(24):
        write(root / f"c{i % 3}/{i:02d}.png", encoded(noise(100 + i)))
    return root


@pytest.fixture
def tars(tmp_path):
    """Uneven tar shards with keys that start anew in each; the samples by their keys."""
    contents = {}
    for number, images in enumerate((3, 1, 7)):
        samples = [sample(f"n/{i:03d}", 10 * number + i, 5 * number + i) for i in range(images)]
        write_tar(tmp_path / f"tars/train-{number}.tar", samples)
        contents |= {f"train-{number}/{one['__key__']}": one for one in samples}
    return tmp_path / "tars", contents


@pytest.fixture
def alone():
    with process_group():
        yield


@pytest.fixture
def ranks(tmp_path):
    ranks = Forked(tmp_path)
    yield ranks
    ranks.kill()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run that nothing happened to, by its overrides."""
    runs = {}

    def of(*overrides):
        if overrides not in runs:
            folder = tmp_path_factory.mktemp("undisturbed")
            Forked(folder).run(2, train_tiny, f"run={folder / 'run'}", *overrides)
            runs[overrides] = folder / "run"
        return runs[overrides]

    return of


@pytest.fixture
def small_disk(tmp_path):
    """Makes a file system of few bytes; `small_disk(folder, size)` also changes the size of one."""
    mounted = []

    def make(folder, size):
        options = f"{'remount,' if folder in mounted else ''}size={size}"
        folder.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"needs the right to mount a tmpfs: {done.stderr.strip()}")
        mounted.append(folder)

    yield make
    for folder in set(mounted):
        subprocess.run(["umount", "--lazy", folder], stderr=subprocess.DEVNULL)  # unless the test did


@pytest.fixture(scope="session")
def same(metrics, tensors):
    def check(run, whole, said="", last="checkpoints/000000000640"):
        assert metrics(run) == metrics(whole), said
        expected, found = tensors(whole / last), tensors(run / last)
        assert expected.keys() == found.keys(), said
        assert all(torch.equal(expected[name], found[name]) for name in expected), said

    return check
