"""From JPEGs to samples by way of pixels: the tool that makes them, training, and samples that need no decoding."""

import json
import re
import runpy
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from data.extraction.crop import center_crop
from data.neighbors.graph import build_graph
from data.stores.shards import agree_on_settings, finish, write_shard
from data.stores.store import Store, read_manifest
from tests.stores import cut, shards, stored
from tools.benchmarks.pictures import write_pictures
from trainer.checkpoints.weights import WeightSource, find_checkpoint
from trainer.config.tree import load_config
from trainer.loop import train
from trainer.sampling.samples import make_samples, write_samples

NUMBER, SIDE = 24, 32
CONFIG = "tests/trainer/tiny.yaml"


def make(images, out, *more):
    options = ["--size", SIDE, "--shard-size", 7, "--workers", 0]
    return ["precompute_pixels", "--images", images, "--out", out, *options, *more]


@pytest.fixture
def here(monkeypatch, capsys):
    """Run the tool in this process; (what it printed, what it said at its end)."""
    monkeypatch.syspath_prepend("tools")

    def run(*command):
        monkeypatch.setattr(sys, "argv", list(map(str, command)))
        try:
            runpy.run_path("tools/precompute_pixels.py", run_name="__main__")
        except SystemExit as end:
            return capsys.readouterr().out, str(end.code)
        return capsys.readouterr().out, ""

    return run


@pytest.fixture(scope="module")
def road(tool, tmp_path_factory):
    """Crops of photographs in /images, their /pixels by two processes, the neighbour /graph of their thumbnails."""
    root = tmp_path_factory.mktemp("road")
    write_pictures(root / "images", NUMBER)
    done = tool(*make(root / "images", root / "pixels", "--procs", 2))
    assert f"complete, {NUMBER} images, 0 rejected" in done.out
    store = Store(root / "pixels", read_manifest(root / "pixels", "pixels", ""))
    keys = [key.decode() for key in store.index["key"]]
    small = store.read("pixels", np.arange(NUMBER))[:, :, ::8, ::8].reshape(NUMBER, -1) / 255 - 0.5
    small /= np.linalg.norm(small, axis=1, keepdims=True)
    agree_on_settings(root / "features", {"name": "thumbnails"})
    write_shard(root / "features/features-000000.tar", keys, [0] * NUMBER, {"feature": small.astype(np.float16)}, [])
    finish(root / "features", "features", 1, 4, 0)
    build_graph(root / "features", root / "graph", 8, "exact", 1, "fp32", "cpu")
    return root


def overrides(root, run):
    data = ["data.name=pixels", f"data.pixels={root}/pixels", f"data.neighbors={root}/graph", "data.channels=3"]
    model = ["model.patch=8", "groups.neighbors=8", "groups.threshold=0.5", f"run={run}", "engine=single"]
    return [*data, *model, f"data.side={SIDE}", "train.images=160", "train.global_batch=16"]


def test_the_tool_leaves_every_crop_once_and_goes_on_where_it_was(road, here, tmp_path):
    found = stored(road / "pixels", "pixels", "pixels")
    paths = {str(path.relative_to(road / "images").with_suffix("")): path for path in road.glob("images/*/*.jpg")}
    assert found.keys() == paths.keys() and len(paths) == NUMBER
    for key, (label, crop) in found.items():
        assert (crop == center_crop(Image.open(paths[key]).convert("RGB"), SIDE).transpose(2, 0, 1)).all()
        assert f"class{label}" == key.partition("/")[0]
    out = shutil.copytree(road / "pixels", tmp_path / "out")
    before, whole = shards(out), (out / "manifest.json").read_bytes()
    gone = sorted(out.glob("*.tar"))[1]
    gone.unlink()
    said, code = here(*make(road / "images", out, "--verify"))
    assert f"{gone}: not there" in said and code == "1"
    assert here(*make(road / "images", out)) == (f"{out}: complete, {NUMBER} images, 0 rejected\n", "")
    after = shards(out)
    assert {name: content for name, (content, _) in after.items()} == {n: content for n, (content, _) in before.items()}
    assert [name for name in after if after[name][1] != before[name][1]] == [gone.name], "nothing is done twice"
    assert (out / "manifest.json").read_bytes() == whole
    said, code = here(*make(road / "images", out, "--verify"))
    assert "verified" in said and code == "0"


def test_a_damaged_image_is_named_and_may_be_allowed(road, here, tmp_path):
    images = shutil.copytree(road / "images", tmp_path / "images")
    cut(images / "class1/00001.jpg")
    _, failed = here(*make(images, tmp_path / "out"))
    assert failed.startswith(f"error: {tmp_path}/out/rejected.jsonl: 1 images could not be read") and "\n" not in failed
    assert json.loads((tmp_path / "out/rejected.jsonl").read_text())["key"] == "class1/00001"
    assert "23 images, 1 rejected" in here(*make(images, tmp_path / "out", "--max-rejects", 1))[0]


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (["--images", "nowhere"], "error: --images .*nowhere: no such folder"),
        (["--size", 0], "2"),
        (["--batch", 4], "2"),  # there is no network to give batches to
        (["--nodes", 2], "error: .*sbatch: not found"),
    ],
)
def test_wrong_options_are_refused(road, here, tmp_path, monkeypatch, option, said):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert re.match(said, here(*make(road / "images", tmp_path / "out", *option))[1])


def test_a_network_trains_on_pixels_and_its_samples_are_pixels(road, tmp_path):
    run = tmp_path / "run"
    config = load_config(CONFIG, [*overrides(road, run), "train.sample_every=80", "optim.lr=3e-3"])
    assert train(config) == "finished"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows]
    assert len(losses) == 10 and np.isfinite(losses).all() and losses[-1] < losses[0]
    assert [row["grouped"] for row in rows] == [0.5] * 10

    made, label, record = make_samples(WeightSource(find_checkpoint(run)), config)
    write_samples(tmp_path / "samples", made, label, record, config.sample.group_size)
    arrays = np.load(tmp_path / "samples/samples.npz")
    assert arrays["arr_0"].shape == (8, SIDE, SIDE, 3) and arrays["arr_0"].dtype == np.uint8
    assert arrays["arr_1"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert Image.open(tmp_path / "samples/samples.png").mode == "RGB"


def test_a_run_on_pixels_goes_on_bit_for_bit(road, tmp_path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train(load_config(CONFIG, overrides(road, whole)))
    train(load_config(CONFIG, [*overrides(road, halves), "train.images=80"]))
    train(load_config(CONFIG, [*overrides(road, halves), "data.workers=2"]))
    assert (whole / "metrics.jsonl").read_text() == (halves / "metrics.jsonl").read_text()
