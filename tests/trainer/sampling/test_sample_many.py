"""Samples in number: the same from any number of processes, whatever befalls them."""

import json
import os
import random
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from data.errors import DataError
from data.stores.files import write_json
from tests.trainer.forked import train_tiny
from trainer.checkpoints.weights import WeightSource, find_checkpoint, read_weights
from trainer.config.tree import load_config, parse_config
from trainer.errors import RunError
from trainer.sampling.generate import generate_groups
from trainer.sampling.labels import deal_classes
from trainer.sampling.many import sample_many
from trainer.sampling.networks import load
from trainer.sampling.pictures import to_uint8
from trainer.sampling.samples import describe

NUMBER = 64


HOW = {
    "heun": {"sampler": "heun"},
    "sde": {"sampler": "sde", "labels": "random", "slots": "redrawn"},
}


@pytest.fixture(scope="module", params=HOW)
def of(request, tmp_path_factory):
    """(weights, config) of a tiny run, sampled in two ways."""
    run = tmp_path_factory.mktemp("many") / "run"
    train_tiny(f"run={run}", "engine=single", "train.images=64", "groups.size=4")
    tree = load_config(run / "config.yaml").model_dump()
    tree["sample"] |= {"steps": 3, "batch": 10, "guidance": [1.5, 2.5], "seed": 5, **HOW[request.param]}
    return WeightSource(find_checkpoint(run)), parse_config(tree)


def make(of, out, process, processes, form="npz", number=NUMBER):
    sample_many(*of, number, out, form, process=process, processes=processes)


def share(of, out, processes, form="npz"):
    """What each rank does."""
    make(of, out, int(os.environ["RANK"]), processes, form)


def read(out):
    with np.load(out / "samples.npz") as file:
        return file["arr_0"], file["arr_1"]


@pytest.fixture(scope="module")
def alone(of, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    make(of, out, 0, 1)
    return read(out)


@pytest.mark.parametrize("processes", [2, 4])
def test_any_number_of_processes_makes_the_same_images_bit_for_bit(of, alone, ranks, tmp_path, processes):
    ranks.run(processes, share, of, tmp_path / "out", processes)
    for found, expected in zip(read(tmp_path / "out"), alone, strict=True):
        assert np.array_equal(found, expected)
    assert alone[0].shape == (NUMBER, 8, 8, 1) and alone[0].dtype == np.uint8
    assert len(np.unique(alone[0].reshape(NUMBER, -1), axis=0)) == NUMBER


def test_they_are_those_of_their_groups_each_of_one_class_and_cut(of, alone):
    """Made group by group; rounding may differ."""
    loaded = load(*of)
    classes, kept = deal_classes(of[1].sample, NUMBER, 10)
    if of[1].sample.labels == "balanced":
        assert np.bincount(alone[1]).tolist() == [7] * 4 + [6] * 6 and kept.tolist() == [4] * 10 + [3] * 4 + [2] * 6
    images = []
    for group, own in enumerate(classes):
        with loaded.inference():
            chosen = np.array([group]), np.array([own])
            made = generate_groups(loaded.networks, of[1], loaded.images.shape, *chosen, loaded.device).images
        images.append(to_uint8(made)[: kept[group]])
    assert np.array_equal(alone[1], classes.repeat(kept)) and alone[1].dtype == np.int64
    assert np.abs(np.concatenate(images).astype(int) - alone[0]).max() <= 1


def test_what_was_killed_goes_on_and_makes_the_same(of, alone, ranks, tmp_path):
    rng, out = random.Random(random.SystemRandom().random()), tmp_path / "out"
    for _ in range(3):
        started = ranks.start(2, share, of, out, 2)
        time.sleep(rng.uniform(0.2, 1.5))
        for process in started:
            process.kill()
            process.join()
    ranks.run(2, share, of, out, 2)
    assert np.array_equal(read(out)[0], alone[0])


def test_png_files_hold_the_same_images_in_folders_of_their_classes(of, alone, tmp_path):
    make(of, tmp_path, 0, 1, "png")
    files = sorted(tmp_path.glob("*/*.png"), key=lambda file: file.name)
    assert [int(file.stem) for file in files] == list(range(NUMBER))
    assert [int(file.parent.name) for file in files] == alone[1].tolist()
    assert np.array_equal(np.stack([np.asarray(Image.open(file)) for file in files])[..., None], alone[0])


def test_the_record_says_how_they_were_made(of, tmp_path):
    make(of, tmp_path, 0, 1, number=7)
    record, sample = json.loads((tmp_path / "samples.json").read_text()), of[1].sample
    assert len(read(tmp_path)[0]) == record["number"] == 7
    assert (record["sampler"], record["steps"], record["seed"]) == (sample.sampler, 3, 5)
    assert (record["labels"], record["slots"]) == (sample.labels, sample.slots)
    assert record["evaluations"] == {"heun": 6, "sde": 3}[sample.sampler]
    assert record["checkpoint"] == str(of[0].checkpoint) and record["weights"] == "ema"


def test_a_folder_with_other_samples_is_refused(of, tmp_path):
    make(of, tmp_path, 0, 1, number=4)
    changed = of[1].model_copy(update={"sample": of[1].sample.model_copy(update={"seed": 6})})
    with pytest.raises(DataError, match=r"^seed=6: .* was begun with seed=5; set it back, or give another --out$"):
        make((of[0], changed), tmp_path, 0, 1, number=4)


@pytest.mark.parametrize(("number", "labels"), [(40, "balanced"), (80, "balanced"), (60, "groups in turn")])
def test_a_folder_that_an_older_version_began_goes_on_or_is_refused(of, tmp_path, number, labels):
    """Its settings do not say how classes were dealt. Where all groups are whole, they were dealt as they are now."""
    record = describe(*of) | {"number": number, "form": "npz"}
    old = {name: value for name, value in record.items() if name not in ("per_class", "labels", "slots")}
    write_json(tmp_path / "settings.json", old)
    now = {"labels": of[1].sample.labels, "slots": of[1].sample.slots}
    before = {"labels": labels, "slots": "fixed"}
    if now == before:
        make(of, tmp_path, 0, 1, number=number)
        assert np.bincount(read(tmp_path)[1]).tolist() == [number // 10] * 10
        return
    with pytest.raises(DataError, match=r"was begun with (labels|slots)=") as raised:
        make(of, tmp_path, 0, 1, number=number)
    name = str(raised.value).partition("=")[0]
    assert f"begun with {name}={before[name]}; set it back, or give another --out" in str(raised.value)
    assert not (tmp_path / "parts").exists()


@pytest.mark.parametrize("form", ["npz", "png"])
def test_samples_that_are_not_finite_end_it_with_one_line_and_nothing_of_their_part(of, tmp_path, form):
    """By weights that are not finite for class 3."""
    weights = read_weights(of[0].checkpoint)
    weights["y_embedder.embedding_table.weight"][3] = torch.nan
    file = tmp_path / "spoiled.safetensors"
    save_file(weights, file)
    classes, _ = deal_classes(of[1].sample, NUMBER, 10)
    first = 4 * classes.tolist().index(3)
    with pytest.raises(RunError) as raised:
        sample_many(WeightSource(None, False, file), of[1], NUMBER, tmp_path / "out", form)
    assert str(raised.value).startswith(f"weights={file}: image {first} is not finite after step 1 of 3; ")
    assert "\n" not in str(raised.value)
    assert len([*(tmp_path / "out/parts").glob("*.npz")]) == first // 8, "parts before it, of two groups each"
    assert len([*tmp_path.glob("out/*/*.png")]) == (first // 8 * 8 if form == "png" else 0)
    assert not (tmp_path / "out/samples.json").exists() and not (tmp_path / "out/samples.npz").exists()


def test_a_full_disk_is_one_line_and_what_is_complete_stays(of, alone, small_disk, tmp_path):
    out = tmp_path / "small"
    small_disk(out, 24_000)
    with pytest.raises(DataError, match="No space left") as caught:
        make(of, out, 0, 1)
    assert "\n" not in str(caught.value)
    small_disk(out, 10_000_000)
    make(of, out, 0, 1)
    assert np.array_equal(read(out)[0], alone[0])
