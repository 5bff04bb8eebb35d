"""tools/evaluate.py: reports by classifier and by detector, sweeps, and one-line errors."""

import json
import re
import runpy
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.trainer import detectors
from tests.trainer.detectors import Plain, save_images
from trainer.checkpoints.weights import WeightSource, find_checkpoint
from trainer.config.tree import load_config
from trainer.errors import RunError
from trainer.loop import train
from trainer.sampling.samples import make_samples, write_samples

SMALL = ["model.depth=1", "model.width=32", "train.images=640", "sample.steps=2", "sample.per_class=8", "engine=single"]
SMALL += ["groups.variant=light", "groups.size=4", "optim.warmup=0", "optim.lr=1e-2", "optim.ema=0.5"]


def evaluate(*arguments):
    """The tool inside this process, which is fast."""
    runpy.run_path("tools/evaluate.py")["main"]([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate") / "run"
    config = load_config("configs/digits.yaml", [f"run={folder}", *SMALL])
    train(config)
    write_samples(folder, *make_samples(WeightSource(find_checkpoint(folder)), config), config.sample.group_size)
    return folder


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A detector and real images for it."""
    folder = tmp_path_factory.mktemp("measured")
    detectors.save(Plain(6), folder / "plain.pt")
    save_images(folder / "real.npz", 50, seed=2, side=8, channels=1)
    return folder


def test_by_the_classifier_it_reports_precision_recall_and_kid_too(run):
    evaluate(run)
    report = json.loads((run / "report.json").read_text())
    assert report["images"] == 80 and report["samples"] == json.loads((run / "samples.json").read_text())
    assert report["frechet"] > report["frechet_train"] and report["kid"] > 0
    assert 0 <= report["precision"] <= 1 and 0 <= report["recall"] <= 1


def test_with_a_detector_each_evaluation_is_a_line_with_what_makes_it_comparable(run, measured, capsys):
    arguments = run, "--detector", measured / "plain.pt", "--reference", measured / "real.npz"
    for metrics in ("fid", "kid,recall"):
        evaluate(*arguments, "--metrics", metrics)
    first, second = map(json.loads, (run / "evaluations.jsonl").read_text().splitlines())
    assert "fid" in first and "kid" not in first and "fid" not in second and {"kid", "recall"} <= second.keys()
    samples = json.loads((run / "samples.json").read_text())
    for name in (
        "checkpoint",
        "weights",
        "sampler",
        "steps",
        "guidance",
        "cond_group_size",
        "uncond_group_size",
        "seed",
    ):
        assert first["samples"][name] == samples[name], name
    assert first["images"]["images"] == 80 and first["reference"]["images"] == 50
    for part in ("reference", "detector"):
        assert re.fullmatch("[0-9a-f]{64}", first[part]["sha256"])
    assert set(first["version"]) == {"group-diffusion", "torch"}
    capsys.readouterr()
    evaluate("--images", run / "samples.npz", *arguments[1:], "--metrics", "fid")
    report = json.loads(capsys.readouterr().out)
    assert report["fid"] == first["fid"] and report["samples"] == samples


def test_a_sweep_samples_and_measures_every_combination_and_makes_none_twice(run, measured):
    sweep = ["--sweep", "sample.guidance=1,3", "--sweep", "sample.uncond_group_size=1,4", "--sweep", "weights=ema,raw"]
    arguments = run, "sample.per_class=4", *sweep
    evaluate(*arguments)
    rows = [json.loads(line) for line in (run / "sweep/sweep.jsonl").read_text().splitlines()]
    assert len(rows) == 8 and len({json.dumps(row["axes"]) for row in rows}) == 8
    for row in rows:
        axes, samples = row["axes"], row["samples"]
        assert samples["guidance"] == [float(axes["sample.guidance"])] and row["images"] == 40
        assert samples["uncond_group_size"] == int(axes["sample.uncond_group_size"])
        assert samples["weights"] == {"ema": "ema", "raw": "model"}[axes["weights"]]
    assert len({row["frechet"] for row in rows}) == 8, "they differ"
    with Image.open(run / "sweep/sweep.png") as picture:
        assert min(picture.size) > 300 and np.asarray(picture.convert("L")).std() > 5

    made = {path: path.stat().st_mtime_ns for path in (run / "sweep").rglob("samples.npz")}
    removed = sorted(made)[0]
    removed.with_name("samples.json").unlink()  # as if it had been killed there
    evaluate(*arguments, "--detector", measured / "plain.pt", "--reference", measured / "real.npz")
    again = {path: path.stat().st_mtime_ns for path in (run / "sweep").rglob("samples.npz")}
    assert {path for path in made if made[path] != again[path]} == {removed}
    rows = [json.loads(line) for line in (run / "sweep/sweep.jsonl").read_text().splitlines()]
    assert len(rows) == 8 and all({"fid", "kid", "precision", "recall"} <= row.keys() for row in rows)


def test_a_sweep_of_one_value_has_its_measures_and_a_picture(run, tmp_path):
    evaluate(run, "sample.per_class=4", "--sweep", "sample.guidance=1.5", "--out", tmp_path)
    (row,) = [json.loads(line) for line in (tmp_path / "sweep.jsonl").read_text().splitlines()]
    assert row["axes"] == {"sample.guidance": "1.5"} and row["images"] == 40
    with Image.open(tmp_path / "sweep.png") as picture:
        assert min(picture.size) > 300 and np.asarray(picture.convert("L")).std() > 5


ERRORS = {
    "no run": ([], "RUN: give a run folder, or --images"),
    "half a detector": (["RUN", "--detector", "x.pt"], "--detector, --reference: give both"),
    "images alone": (["--images", "x.npz"], "--images x.npz: needs --detector and --reference"),
    "metrics alone": (["RUN", "--metrics", "fid"], "--metrics fid: needs --detector and --reference"),
    "a cache alone": (["RUN", "--cache", "x"], "--cache x: needs --detector and --reference"),
    "an override": (["RUN", "sample.steps=3"], "sample.steps=3: is for --sweep"),
    "a sweep of the model": (["RUN", "--sweep", "model.depth=1,2"], "only sample.* and weights"),
    "an empty sweep": (["RUN", "--sweep", "sample.steps="], "write field=value,value"),
    "a wrong value": (["RUN", "--sweep", "sample.steps=2,none"], "sample.steps=none"),
    "no images": (["--images", "none", "--detector", "PLAIN", "--reference", "REAL"], "none: not there"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_is_wrong_is_said_before_the_work(run, measured, name):
    arguments, message = ERRORS[name]
    places = {"RUN": run, "PLAIN": measured / "plain.pt", "REAL": measured / "real.npz"}
    before = sorted(run.rglob("*"))
    with pytest.raises(RunError) as raised:
        evaluate(*(places.get(argument, argument) for argument in arguments))
    assert message in str(raised.value) and "\n" not in str(raised.value), raised.value
    assert sorted(run.rglob("*")) == before


def test_an_error_is_one_line_and_exit_code_1(run):
    done = subprocess.run([sys.executable, "tools/evaluate.py"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: RUN: give a run folder, or --images with a file or folder of images\n"
