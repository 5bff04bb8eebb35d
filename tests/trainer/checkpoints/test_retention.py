"""Which checkpoints stay."""

import os
import random
import subprocess

import pytest
import torch

from data.sets.form import ImageForm
from tests.trainer.forked import positions, train_tiny
from trainer.checkpoints import folder as checkpoint
from trainer.checkpoints.config import CheckpointConfig
from trainer.checkpoints.folder import CHECKPOINTS
from trainer.checkpoints.retention import prune, remove

FORM = ImageForm((1, 8, 8), 10, None, "images")

RANDOM = random.SystemRandom()
LAST = "checkpoints/000000000640"
MB = 1 << 20


def small_state():
    return {"model": {"a": torch.randn(3)}}


def test_what_stays_is_the_newest_the_first_after_each_multiple_and_the_best(alone, tmp_path):
    """By the whole history: pruning after each save loses nothing that a later one would keep."""
    for number in range(12):
        folder = tmp_path / str(number)
        keep, keep_every, best = RANDOM.randint(1, 4), RANDOM.choice([0, 50, 100, 230]), RANDOM.random() < 0.7
        config = CheckpointConfig(keep=keep, keep_every=keep_every, keep_best="loss" if best else None)
        history, position = [], 0
        for _ in range(12):
            position += RANDOM.choice([1, 20, 50, 90, 300])
            metrics = {"loss": RANDOM.choice([1.0, 2.0, 3.0])} if RANDOM.random() < 0.8 else {"other": 0.0}
            history.append((position, metrics.get("loss")))
            checkpoint.save(folder, position, small_state(), "", FORM, metrics)
            prune(folder, config)
            expected = {seen for seen, _ in history[-keep:]}
            for multiple in range(keep_every, position + 1, keep_every or position + 1):
                if keep_every:
                    expected |= {seen for seen, _ in [one for one in history if one[0] >= multiple][:1]} & set(
                        range(multiple, multiple + keep_every)
                    )
            if best:
                measured = [(loss, seen) for seen, loss in history if loss is not None]
                expected |= {min(measured)[1]} if measured else set()
            assert positions(folder) == sorted(expected), (config, history)


def test_a_damaged_checkpoint_neither_counts_nor_goes_so_the_last_good_ones_stay(alone, tmp_path):
    for number in range(8):
        folder, keep = tmp_path / str(number), RANDOM.randint(1, 3)
        good, damaged = [], []
        for position in range(1, 13):
            checkpoint.save(folder, position, small_state(), "seed: 0\n", FORM, {"loss": 1.0 / position})
            good.append(position)
            if RANDOM.random() < 0.5:
                broken = RANDOM.choice(good)
                file = RANDOM.choice(sorted((folder / f"{broken:012d}").iterdir()))
                size = RANDOM.randrange(-1, file.stat().st_size)
                file.unlink() if size < 0 else os.truncate(file, size)
                good.remove(broken)
                damaged.append(broken)
            prune(folder, CheckpointConfig(keep=keep, keep_best="loss"))
            good = good[-keep:]  # the loss falls: the best is the newest
            assert positions(folder) == sorted(good + damaged)
    for path in (folder / f"{position:012d}" for position in good):
        checkpoint.verify(path)


def test_what_cannot_be_deleted_now_harms_no_run_and_goes_later(alone, small_disk, tmp_path):
    """As a file on NFS that somebody reads; here something is mounted in the checkpoint."""
    checkpoint.save(tmp_path, 1, small_state(), "", FORM)
    small_disk(tmp_path / "000000000001/busy", MB)
    checkpoint.save(tmp_path, 2, small_state(), "", FORM)
    prune(tmp_path, CheckpointConfig(keep=1))
    left = tmp_path / "000000000001.incomplete"
    assert checkpoint.find(tmp_path) == ([tmp_path / "000000000002"], [left])
    subprocess.run(["umount", left / "busy"], check=True)
    remove(left)
    assert positions(tmp_path) == [2] and not left.exists()


def test_a_run_keeps_the_checkpoint_of_its_lowest_loss(ranks, undisturbed, metrics, tmp_path):
    run = tmp_path / "run"
    command = [f"run={run}", "checkpoint.every=96", "checkpoint.keep=1", "checkpoint.keep_best=loss"]
    ranks.run(2, train_tiny, *command)
    losses = [row["loss"] for row in metrics(run)]
    ends = [*range(96, 640, 96), 640]
    means = {end: sum(part) / len(part) for end in ends if (part := losses[(end - 1) // 96 * 3 : end // 32])}
    best = min(means, key=means.get)
    assert positions(run / CHECKPOINTS) == sorted({best, 640})
    found = checkpoint.read_manifest(run / f"checkpoints/{best:012d}")["metrics"]["loss"]
    assert found == pytest.approx(means[best])


def test_one_that_cannot_be_moved_away_stays_with_a_warning(alone, tmp_path):
    for position in (1, 2, 3):
        checkpoint.save(tmp_path, position, small_state(), "", FORM)
    (tmp_path / "000000000001.incomplete").mkdir()
    (tmp_path / "000000000001.incomplete/of a user").touch()
    with pytest.warns(UserWarning, match="000000000001: cannot be removed: Directory not empty"):
        prune(tmp_path, CheckpointConfig(keep=1))
    assert positions(tmp_path) == [1, 3]
