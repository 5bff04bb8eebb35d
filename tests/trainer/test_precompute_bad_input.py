"""What is wrong with images, tars, networks, folders or the disk is one line, and what is complete stays."""

import json
import shutil
import subprocess
import tarfile

import numpy as np
import pytest
import torch
import webdataset
from safetensors.torch import load_file, save_file

from data.errors import DataError
from data.extraction.sources import list_source, shared_source
from data.extraction.verify import verify_store
from data.stores.files import WORK
from data.stores.shards import MANIFEST
from models.pretrained.vae import VAE
from tests.stores import cut, encoded, features, latents, noise, refused, sample, shards, stored, write, write_tar

WEIGHTS = "diffusion_pytorch_model.safetensors"


def damage(images, names):
    """Make five files bad, each in another way."""
    write(images / names[0], encoded(noise(1, 300, 300), "JPEG"))
    cut(images / names[0])
    cut(images / names[1])
    (images / names[2]).write_bytes(b"")
    (images / names[3]).write_text("no image at all")
    (images / names[4]).unlink()


def test_damaged_images_are_named_with_reason_and_shard_the_others_are_there_and_leave_is_all_it_takes(
    plain, vae, tmp_path, monkeypatch
):
    """The first shard has only damaged ones."""
    images, out = shutil.copytree(plain, tmp_path / "images"), tmp_path / "out"
    clean = latents(images, tmp_path / "clean", vae) and stored(tmp_path / "clean")
    shared_source(images, 4, out)  # as if the work had begun
    bad = ["c0/00.png", "c0/03.png", "c0/06.png", "c0/09.png", "c2/20.png"]
    damage(images, bad)
    message = refused(latents, images, out, vae)
    assert "5 images could not be read, more than --max-rejects 0" in message
    rows = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert [row["key"] for row in rows] == [name.removesuffix(".png") for name in bad]
    assert [row["shard"] for row in rows] == ["latents-000000.tar"] * 4 + ["latents-000005.tar"]
    assert [row["file"] for row in rows] == [str(images / name) for name in bad]
    assert all(row["reason"] for row in rows) and rows[4]["reason"] == "No such file or directory"
    assert not (out / MANIFEST).exists() and len(shards(out)) == 6
    refused(latents, images, out, vae, max_rejects=4)
    before = shards(out)

    def encode_again(self, images):
        raise AssertionError("what is there is not computed again")

    with monkeypatch.context() as patch:
        patch.setattr(VAE, "moments", encode_again)
        manifest = latents(images, out, vae, max_rejects=5)
    assert manifest["images"] == 19 and manifest["rejected"] == 5 and shards(out) == before
    found = stored(out)
    assert found.keys() == clean.keys() - {row["key"] for row in rows}
    for key, (label, moments) in found.items():
        assert label == clean[key][0]
        np.testing.assert_allclose(moments, clean[key][1], rtol=1e-4, atol=2e-5)
    paths = [str(path) for path in sorted(out.glob("*.tar"))]
    assert [s["__key__"] for s in webdataset.WebDataset(paths, shardshuffle=False, empty_check=False)] == list(found)
    write(images / bad[4], b"")
    assert list(verify_store(out, list_source(images, 4))) == []


def test_if_not_one_image_can_be_read_that_is_said(vae, tmp_path):
    for i in range(6):
        write(tmp_path / f"images/a/{i}.jpg", b"x" * i)
    message = refused(latents, tmp_path / "images", tmp_path / "out", vae, max_rejects=6)
    assert "not one image could be read" in message
    assert not (tmp_path / "out" / MANIFEST).exists()


def test_samples_without_image_or_label_are_rejected_and_the_others_are_there(tars, vae, tmp_path):
    images, contents = tars
    bad = [
        {"__key__": "blind", "cls": 1},
        {"__key__": "nameless", "jpg": contents["train-0/n/000"]["jpg"]},
        {"__key__": "word", "jpg": contents["train-0/n/000"]["jpg"], "cls": b"cat"},
        {"__key__": "minus", "jpg": contents["train-0/n/000"]["jpg"], "cls": b"-1"},
    ]
    write_tar(images / "bad.tar", [bad[0], sample("good", 77, 3), *bad[1:]])
    assert "4 images could not be read" in refused(latents, images, tmp_path / "out", vae)
    manifest = latents(images, tmp_path / "out", vae, max_rejects=4)
    assert manifest["images"] == 12
    rows = [json.loads(line) for line in (tmp_path / "out/rejected.jsonl").read_text().splitlines()]
    assert {row["key"] for row in rows} == {f"bad/{one['__key__']}" for one in bad}
    assert next(iter(stored(tmp_path / "out"))) == "bad/good"
    assert list(verify_store(tmp_path / "out", list_source(images, 1))) == []


def test_one_key_twice_in_a_tar_is_refused(tars, vae, tmp_path):
    images, _ = tars
    write_tar(images / "x.tar", [sample("a", 0, 0), sample("b", 1, 0), sample("a", 2, 0)])
    assert "x/a" in refused(latents, images, tmp_path / "out", vae)


@pytest.mark.parametrize("end", [0.1, 0.5, 0.9])
def test_an_input_tar_that_was_cut_off_is_named(tars, vae, tmp_path, end):
    images, _ = tars
    path = images / "train-2.tar"
    path.write_bytes(path.read_bytes()[: int(end * path.stat().st_size)])
    assert str(path) in refused(latents, images, tmp_path / "out", vae)


def test_every_place_where_an_input_tar_may_be_cut_off_is_noticed(tmp_path):
    path = tmp_path / "a.tar"
    write_tar(path, [{"__key__": str(i), "png": b"x" * 700, "cls": i} for i in range(4)])
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        last = list(tar)[-1]
    end = -(-(last.offset_data + last.size) // 512) * 512
    for length in range(0, end, 128):
        path.write_bytes(whole[:length])
        assert "a.tar" in refused_source(tmp_path)


def refused_source(root):
    with pytest.raises(Exception, match="not a whole tar file") as error:
        list_source(root, 4).items(0)
    return str(error.value)


def test_an_input_tar_that_is_gone_is_named(tars, vae, tmp_path):
    images, _ = tars
    shared_source(images, 4, tmp_path / "out")
    (images / "train-1.tar").unlink()
    assert str(images / "train-1.tar") in refused(latents, images, tmp_path / "out", vae)


def test_a_class_folder_that_is_gone_is_named(plain, vae, tmp_path):
    images = shutil.copytree(plain, tmp_path / "images")
    shared_source(images, 4, tmp_path / "out")
    shutil.rmtree(images / "c1")
    assert str(images / "c1") in refused(latents, images, tmp_path / "out", vae)


@pytest.mark.parametrize("label", [2**31, 10**20])
def test_a_label_that_no_index_can_hold_is_said(tars, vae, tmp_path, label):
    images, _ = tars
    write_tar(images / "x.tar", [sample("a", 0, label)])
    message = refused(latents, images, tmp_path / "out", vae)
    assert str(label) in message or "rejected.jsonl" in message


@pytest.mark.parametrize("images", ["nowhere", "empty", "double"])
def test_images_that_cannot_be_used_leave_a_folder_that_the_right_ones_can_use(plain, vae, tmp_path, images):
    (tmp_path / "empty/a").mkdir(parents=True)
    for name in ("x.jpg", "x.png"):
        write(tmp_path / "double/a" / name, encoded(noise(0)))
    message = refused(latents, tmp_path / images, tmp_path / "out", vae)
    assert f"--images {tmp_path / images}: " in message
    assert latents(plain, tmp_path / "out", vae)["images"] == 24


def test_a_store_inside_the_images_folder_is_refused_or_no_class(plain, vae, tmp_path):
    """Its name goes before the classes' and would move their numbers."""
    images = shutil.copytree(plain, tmp_path / "images")
    try:
        latents(images, images / "a", vae)
    except DataError as error:
        assert "--out" in str(error)
    else:
        assert stored(images / "a")["c0/00"][0] == 0


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_an_out_folder_that_is_a_file_is_named(plain, vae, tmp_path, place):
    (tmp_path / "file").write_text("mine")
    assert str(tmp_path / "file") in refused(latents, plain, tmp_path / place, vae)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_number_of_workers_below_0_is_refused(plain, vae, tmp_path):
    with pytest.raises((DataError, ValueError), match="workers"):
        latents(plain, tmp_path / "out", vae, workers=-1)
    assert not shards(tmp_path / "out")


@pytest.mark.parametrize("size", [36, 4, 65])
def test_a_size_that_is_no_multiple_of_the_vaes_factor_is_refused(plain, vae, tmp_path, size):
    assert f"--size {size}: " in refused(latents, plain, tmp_path / "out", vae, image_size=size)
    assert not (tmp_path / "out").exists()


def lack(name, weights):
    def change(folder):
        tensors = load_file(folder / weights)
        del tensors[name]
        save_file(tensors, folder / weights, metadata={"format": "pt"})

    return change


def reshape(folder):
    tensors = load_file(folder / WEIGHTS)
    tensors["encoder.conv_in.weight"] = torch.zeros(8, 3, 5, 5)
    save_file(tensors, folder / WEIGHTS)


DAMAGES = {
    "no folder": shutil.rmtree,
    "no config": lambda folder: (folder / "config.json").unlink(),
    "config cut off": lambda folder: cut(folder / "config.json"),
}
VAE_DAMAGES = DAMAGES | {
    "weights cut off": lambda folder: cut(folder / WEIGHTS),
    "no weights": lambda folder: (folder / WEIGHTS).unlink(),
    "other shapes": reshape,
    "a weight lacks": lack("encoder.conv_in.weight", WEIGHTS),
}
ENCODER_DAMAGES = DAMAGES | {
    "weights cut off": lambda folder: cut(folder / "model.safetensors"),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "no processor": lambda folder: (folder / "preprocessor_config.json").unlink(),
    "a weight lacks": lack("visual_projection.weight", "model.safetensors"),
}


@pytest.mark.parametrize("name", VAE_DAMAGES)
def test_a_vae_that_cannot_be_loaded_is_named(plain, vae, tmp_path, name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = shutil.copytree(vae, tmp_path / "vae")
    VAE_DAMAGES[name](folder)
    assert f"--vae {folder}: cannot be loaded: " in refused(latents, plain, tmp_path / "out", folder)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ENCODER_DAMAGES)
def test_an_encoder_that_cannot_be_loaded_is_named(plain, encoder, tmp_path, name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = shutil.copytree(encoder, tmp_path / "encoder")
    ENCODER_DAMAGES[name](folder)
    assert f"--encoder {folder}: cannot be loaded: " in refused(features, plain, tmp_path / "out", folder)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 120 kB, and how it is made larger."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=120k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        yield folder, lambda: subprocess.run(["mount", "-o", "remount,size=9m", folder], check=True)
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def test_on_a_full_disk_complete_shards_stay_and_with_more_room_the_same_call_finishes(plain, vae, small_disk):
    folder, enlarge = small_disk
    message = refused(latents, plain, folder / "out", vae)
    assert "No space left on device" in message and str(folder / "out") in message
    before = shards(folder / "out")
    assert 0 < len(before) < 6
    for name in before:
        with tarfile.open(folder / "out" / name) as tar:
            assert len(tar.getnames()) == 8, "whole"
    assert [path for path in (folder / "out" / WORK).iterdir() if path.suffix != ".lock"] == []
    assert "No space left" in refused(latents, plain, folder / "out", vae)
    enlarge()
    assert latents(plain, folder / "out", vae)["images"] == 24
    assert before.items() <= shards(folder / "out").items()
    assert list(verify_store(folder / "out", list_source(plain, 4))) == []
