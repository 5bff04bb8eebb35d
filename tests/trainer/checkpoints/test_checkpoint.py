import json
import random

import pytest
import torch

from data.sets.form import ImageForm
from trainer.checkpoints import folder as checkpoint
from trainer.checkpoints.config import CheckpointConfig
from trainer.checkpoints.retention import prune, remove
from trainer.errors import RunError

FORM = ImageForm((1, 8, 8), 10, None, "images")


def state(seed):
    torch.manual_seed(seed)
    return {"model": {"a": torch.randn(4, 3), "b": torch.randn(5)}, "ema": {"a": torch.randn(4, 3)}}


def test_what_was_saved_is_loaded_bit_for_bit_with_its_position(alone, tmp_path):
    for seed in range(3):
        saved, loaded = state(seed), state(seed + 100)
        checkpoint.save(tmp_path, 32 * (seed + 1), saved, "seed: 0\n", FORM)
        complete, incomplete = checkpoint.find(tmp_path)
        assert checkpoint.load(complete[-1], loaded) == 32 * (seed + 1)
        assert not incomplete
        assert all(torch.equal(saved[part][n], loaded[part][n]) for part in saved for n in saved[part])
        assert (complete[-1] / "config.yaml").read_text() == "seed: 0\n"


def test_the_newest_is_that_of_the_highest_position_whatever_size_or_age(alone, tmp_path):
    for position in random.sample([96, 128, 1000, 10_000], 4):
        checkpoint.save(tmp_path, position, {"model": {"a": torch.randn(10_000 // position)}}, "", FORM)
    complete, _ = checkpoint.find(tmp_path)
    assert [int(path.name) for path in complete] == [96, 128, 1000, 10_000]


@pytest.mark.parametrize("keep", [1, 2, 5])
@pytest.mark.parametrize("keep_every", [0, 1, 3, 4])
def test_the_newest_and_every_mth_stay(keep, keep_every, alone, tmp_path):
    config = CheckpointConfig(every=100, keep=keep, keep_every=100 * keep_every)
    for number in range(1, 11):  # saved at the first step that passes a multiple of `every`
        checkpoint.save(tmp_path, 100 * number + number % 7, state(0), "", FORM)
        prune(tmp_path, config)
    left = [int(path.name) // 100 for path in checkpoint.find(tmp_path)[0]]
    for_good = [n for n in range(1, 11) if keep_every and n % keep_every == 0]
    assert left == sorted({*range(11 - keep, 11), *for_good})


def test_of_saves_between_the_regular_ones_none_stays_for_good(alone, tmp_path):
    for position in (32, 100, 200, 300, 332, 364, 400, 500, 600, 632):  # 32, 332, 364 and 632: the run was stopped
        checkpoint.save(tmp_path, position, state(0), "", FORM)
        prune(tmp_path, CheckpointConfig(every=100, keep=1, keep_every=300))
    assert [int(path.name) for path in checkpoint.find(tmp_path)[0]] == [300, 600, 632]


def test_a_removal_killed_half_way_leaves_no_checkpoint(alone, tmp_path, monkeypatch):
    for position in (32, 64):
        checkpoint.save(tmp_path, position, state(0), "", FORM)
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda path, **_: (path / checkpoint.MANIFEST).unlink())
    prune(tmp_path, CheckpointConfig(keep=1))
    complete, incomplete = checkpoint.find(tmp_path)
    assert [path.name for path in complete] == ["000000000064"]
    assert [path.name for path in incomplete] == ["000000000032.incomplete"]
    monkeypatch.undo()
    for path in incomplete:
        remove(path)
    assert checkpoint.find(tmp_path) == (complete, [])


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path):
    (tmp_path / "000000000064").mkdir()
    with pytest.raises(RunError, match=r"000000000064/manifest.json: no such file"):
        checkpoint.verify(tmp_path / "000000000064")


def test_every_file_of_a_checkpoint_is_in_its_manifest_and_missed_when_gone(alone, tmp_path):
    checkpoint.save(tmp_path, 32, state(0), "x: 1\n", FORM)
    folder = tmp_path / "000000000032"
    files = {path.name for path in folder.iterdir()} - {checkpoint.MANIFEST}
    assert set(json.loads((folder / checkpoint.MANIFEST).read_text())["files"]) == files
    for name in files:
        kept = (folder / name).read_bytes()
        (folder / name).unlink()
        with pytest.raises(RunError, match=f"{name}: no file"):
            checkpoint.verify(folder)
        (folder / name).write_bytes(kept[:-1])
        with pytest.raises(RunError, match=f"{name}: {len(kept) - 1}, should be {len(kept)} bytes"):
            checkpoint.verify(folder)
        (folder / name).write_bytes(kept)
    checkpoint.verify(folder)


def test_a_parameter_that_is_missing_or_of_another_shape_is_named(alone, tmp_path):
    checkpoint.save(tmp_path, 32, state(0), "", FORM)
    wrong = state(0)
    wrong["model"]["b"] = torch.randn(6)
    with pytest.raises(RunError, match=r"model\.b is \(5,\), the network's is \(6,\)"):
        checkpoint.load(tmp_path / "000000000032", wrong)
    wrong = state(0)
    wrong["ema"]["c"] = torch.randn(2)
    with pytest.raises(RunError, match=r"ema\.c is nothing, the network's is \(2,\)"):
        checkpoint.load(tmp_path / "000000000032", wrong)
