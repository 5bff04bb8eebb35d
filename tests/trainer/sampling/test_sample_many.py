"""Samples in number: the same from any number of processes, whatever befalls them."""

import json
import os
import random
import time

import numpy as np
import pytest
from PIL import Image

from data.errors import DataError
from tests.trainer.forked import train_tiny
from trainer.checkpoints.weights import WeightSource, find_checkpoint
from trainer.config.tree import load_config, parse_config
from trainer.sampling.many import sample_many

NUMBER = 64


@pytest.fixture(scope="module", params=["heun", "sde"])
def of(request, tmp_path_factory):
    """(weights, config) of a tiny run, with sampling by `sampler`."""
    run = tmp_path_factory.mktemp("many") / "run"
    train_tiny(f"run={run}", "engine=single", "train.images=64")
    tree = load_config(run / "config.yaml").model_dump()
    tree["sample"] |= {"sampler": request.param, "steps": 3, "batch": 10, "guidance": [1.5, 2.5], "seed": 5}
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


def test_classes_are_balanced_and_a_group_has_one(of, alone):
    label = alone[1].reshape(-1, of[1].sample.group_size)
    assert (label == label[:, :1]).all()
    counts = np.bincount(label[:, 0], minlength=10)
    assert counts.max() - counts.min() <= 1


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
    assert record["evaluations"] == {"heun": 6, "sde": 3}[sample.sampler]
    assert record["checkpoint"] == str(of[0].checkpoint) and record["weights"] == "ema"


def test_a_folder_with_other_samples_is_refused(of, tmp_path):
    make(of, tmp_path, 0, 1, number=4)
    changed = of[1].model_copy(update={"sample": of[1].sample.model_copy(update={"seed": 6})})
    with pytest.raises(DataError, match=r"^seed=6: .* was begun with seed=5; set it back, or give another --out$"):
        make((of[0], changed), tmp_path, 0, 1, number=4)


def test_a_full_disk_is_one_line_and_what_is_complete_stays(of, alone, small_disk, tmp_path):
    out = tmp_path / "small"
    small_disk(out, 24_000)
    with pytest.raises(DataError, match="No space left") as caught:
        make(of, out, 0, 1)
    assert "\n" not in str(caught.value)
    small_disk(out, 10_000_000)
    make(of, out, 0, 1)
    assert np.array_equal(read(out)[0], alone[0])
