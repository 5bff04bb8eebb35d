"""Configs of older versions are read; on the command line an old name is an error that says the new one."""

import pytest

from trainer.config.strict_yaml import dump
from trainer.config.tree import load_config, stored_config
from trainer.errors import RunError
from trainer.run_folder import check_folder, write_config

OLD = {  # a part of what version 0.1 wrote, which wrote the fields of all backbones and paths
    "run": "runs/x",
    "path": {"name": "linear", "timesteps": "uniform", "learns_variance": True, "noise_scale": 1.0},
    "model": {"backbone": "dit", "depth": 6, "bottleneck": 128, "context_tokens": 32, "context_start": 4},
    "train": {"score_every": 25_600},
}


def test_a_stored_config_of_an_older_version_is_read():
    config = stored_config(dump(OLD))
    assert config.model.depth == 6 and config.train.attention_every == 25_600
    jit = OLD["model"] | {"backbone": "jit", "bottleneck": 64}
    assert stored_config(dump(OLD | {"model": jit})).model.bottleneck == 64, "what the backbone has stays"


def test_what_no_version_had_is_still_refused():
    with pytest.raises(RunError, match=r"model\.botleneck=1: no such field"):
        stored_config(dump(OLD | {"model": {"botleneck": 1}}))


def test_a_user_is_told_the_new_name_and_the_right_backbone():
    with pytest.raises(RunError, match=r"^train\.score_every=1: is now train\.attention_every; set that$"):
        load_config("configs/digits.yaml", ["train.score_every=1"])
    with pytest.raises(RunError, match=r"^model\.bottleneck=1: is for backbone=jit"):
        load_config("configs/digits.yaml", ["model.bottleneck=1"])


def test_files_of_an_older_version_are_read(tmp_path):
    (tmp_path / "config.yaml").write_text(dump(OLD))  # of a run, given instead of the user's file
    assert load_config(tmp_path / "config.yaml") == stored_config(dump(OLD))
    (tmp_path / "mine.yaml").write_text("train: {score_every: 640}")
    assert load_config(tmp_path / "mine.yaml").train.attention_every == 640
    (tmp_path / "mine.yaml").write_text("model: {bottleneck: 64}")
    with pytest.raises(RunError, match=r"^model\.bottleneck=64: is for backbone=jit"):
        load_config(tmp_path / "mine.yaml")


def test_a_plain_run_goes_on_with_the_sample_embedding_that_it_was_begun_with(tmp_path):
    plain = ["groups.variant=none", "groups.size=1", f"run={tmp_path}/run"]
    new, old = (load_config("configs/digits.yaml", plain + more) for more in ([], ["model.max_group_size=16"]))
    assert check_folder(new) == new and new.model.slots == 0
    write_config(old)
    assert check_folder(new) == check_folder(old) == old
    for other, said in (
        ([*plain, "model.max_group_size=1"], r"^model\.max_group_size=1: the run in .* has model\.max_group_size=16;"),
        (plain[-1:], r"^groups\.variant=light: the run in .* has groups\.variant=none;"),
    ):
        with pytest.raises(RunError, match=said):
            check_folder(load_config("configs/digits.yaml", other))
