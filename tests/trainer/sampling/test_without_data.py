"""A run knows its images: it is sampled, exported and converted where its training data are gone."""

import json
import runpy
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from data.errors import DataError
from trainer.checkpoints import folder as checkpoint
from trainer.checkpoints.weights import WeightSource, find_checkpoint
from trainer.config.tree import load_config
from trainer.errors import RunError
from trainer.loop import train

TINY = "tests/trainer/tiny.yaml"
ALONE = ["groups.variant=none", "groups.size=1", "groups.share=0", "model.max_group_size=null"]
SHORT = [*ALONE, "engine=single", "path=ddpm", "sample.sampler=ddim", "train.images=64"]


def call(tool, *arguments):
    runpy.run_path(f"tools/{tool}.py")["main"]([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def world(make_latents, tmp_path_factory):
    """A run on latents of a small random VAE, what it samples, and the latents, which are then taken away."""
    folder = make_latents(tmp_path_factory.mktemp("without"))
    torch.manual_seed(0)
    down, up = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
    vae = AutoencoderKL(
        down_block_types=down, up_block_types=up, latent_channels=2, block_out_channels=(8, 8), norm_num_groups=8
    )
    vae.save_pretrained(folder / "vae")
    data = ["data.name=latents", f"data.latents={folder}/latents", f"data.vae={folder}/vae"]
    train(load_config(TINY, [f"run={folder}/run", *data, *SHORT]))
    call("sample", folder / "run", "--out", folder / "before")
    shutil.move(folder / "latents", folder / "gone")
    return folder


def same_samples(folder, other):
    with np.load(folder / "samples.npz") as a, np.load(other / "samples.npz") as b:
        return all(np.array_equal(a[name], b[name]) for name in ("arr_0", "arr_1"))


def test_the_manifest_says_the_form_of_the_images(world):
    source = WeightSource(find_checkpoint(world / "run"))
    manifest = checkpoint.read_manifest(source.checkpoint)
    assert manifest["images"] == {"shape": [2, 4, 4], "num_classes": 3, "vae": f"{world}/vae"}
    assert source.form().identity == manifest["data"].strip()


def test_a_run_and_its_exported_file_sample_the_same_images_without_the_data(world, tmp_path):
    call("sample", world / "run", "--out", tmp_path / "run")
    call("export_weights", world / "run", tmp_path / "weights.safetensors")
    config = world / "run/config.yaml"
    call("sample", config, "--weights", tmp_path / "weights.safetensors", "--out", tmp_path / "file")
    call("sample", world / "run", "--num", 7, "--out", tmp_path / "many")
    assert same_samples(world / "before", tmp_path / "run") and same_samples(world / "before", tmp_path / "file")
    with np.load(tmp_path / "many/samples.npz") as file:
        assert file["arr_0"].shape == (7, 8, 8, 3)


def test_an_exported_file_becomes_one_of_diffusers_without_the_data(world, tmp_path):
    call("export_weights", world / "run", tmp_path / "weights.safetensors")
    call("convert_weights", "--to", "diffusers", tmp_path / "weights.safetensors", tmp_path / "diffusers")
    settings = json.loads((tmp_path / "diffusers/config.json").read_text())
    assert (settings["sample_size"], settings["in_channels"]) == (4, 2)


def test_a_checkpoint_of_an_older_version_asks_the_data(world, tmp_path):
    run = shutil.copytree(world / "run", tmp_path / "run")
    file = find_checkpoint(run) / checkpoint.MANIFEST
    fields = checkpoint.read_manifest(file.parent)
    del fields["images"]
    file.write_text(checkpoint._manifest_text(fields))
    with pytest.raises(DataError, match=r"latents: no manifest\.json"):
        call("sample", run)
    call("sample", run, f"data.latents={world}/gone")
    assert same_samples(world / "before", run)


def test_a_dry_run_says_that_the_data_are_not_here_and_takes_their_form_from_the_config(world, tmp_path, capsys):
    data = [f"run={tmp_path}/run", "data.name=latents", f"data.latents={world}/latents", *SHORT]
    call("submit", TINY, *data, "data.channels=2", "data.side=4", "--classes", "3", "--dry-run")
    said = capsys.readouterr().out
    assert "# the images are not here: 2x4x4 as data says, 3 classes" in said
    call("submit", TINY, *data, f"data.latents={world}/gone", "--dry-run")
    there = capsys.readouterr().out
    assert "not here" not in there
    parameters = [line for line in said.splitlines() if "parameters" in line]
    assert parameters == [line for line in there.splitlines() if "parameters" in line]
    with pytest.raises(RunError, match=r"^data\.side=null: .*/latents is not here to tell it; set data\.side$"):
        call("submit", TINY, *data, "data.channels=2", "--dry-run")
    with pytest.raises(DataError):
        call("submit", TINY, *data, "data.channels=2", "data.side=4")
