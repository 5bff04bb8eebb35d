"""Real ranks: processes that train tiny runs on the digits, and what they leave behind."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tests.stores import encoded, noise, sample, write, write_tar
from tests.trainer.forked import TINY, Forked, train_tiny
from trainer.ranks import process_group


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
def module_ranks(tmp_path_factory):
    ranks = Forked(tmp_path_factory.mktemp("ranks"))
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
