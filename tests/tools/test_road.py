"""The demo's road with a tiny run: submit, sample, evaluate, and what they leave."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data.images import open_images
from trainer.config import load_config
from trainer.generate import generate, grid, to_uint8
from trainer.loop import build_network
from trainer.ranks import Ranks

CONFIG = "configs/digits.yaml"
SMALL = ["model.depth=1", "model.width=32", "train.images=1280", "train.log_every=128", "sample.every=640"]
SMALL += ["sample.steps=2", "checkpoint.every=640"]


def tool(name, *arguments, code=0):
    done = subprocess.run([sys.executable, f"tools/{name}.py", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    run = tmp_path_factory.mktemp("road") / "run"
    done = tool("submit", "--cluster", "local", "--procs", 2, CONFIG, f"run={run}", *SMALL)
    return run, done


def test_training_shows_progress_and_leaves_config_metrics_events_and_checkpoints(road):
    run, done = road
    assert f"finished: {run}" in done.stdout
    assert "loss=" in done.stderr and "img/s" in done.stderr and "100%" in done.stderr
    assert load_config(run / "config.yaml") == load_config(CONFIG, [f"run={run}", *SMALL])
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["position"] for row in rows] == list(range(128, 1281, 128))
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["000000000640", "000000001280"]
    assert len(list((run / "checkpoints/000000001280").glob("*.distcp"))) == 2, "one shard of each rank"
    events = EventAccumulator(str(run), size_guidance={"images": 0}).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [row["position"] for row in rows]
    assert events.Scalars("train/loss")[-1].value == pytest.approx(rows[-1]["loss"], rel=1e-6)
    assert [event.step for event in events.Images("samples")] == [640, 1280]


def test_sample_and_evaluate_leave_grid_arrays_and_report(road):
    run, _ = road
    tool("sample", run, "sample.per_class=5", "sample.guidance=2")
    arrays = np.load(run / "samples.npz")
    assert arrays["arr_0"].shape == (50, 8, 8, 1) and arrays["arr_0"].dtype == np.uint8
    assert arrays["arr_1"].tolist() == [c for c in range(10) for _ in range(5)]
    picture = np.asarray(Image.open(run / "samples.png"))
    assert picture.shape[0] > 10 * 32 and len(np.unique(picture)) > 50
    report = json.loads(tool("evaluate", run).stdout)
    assert report == json.loads((run / "report.json").read_text())
    assert report["images"] == 50 and 0 <= report["class_accuracy"] <= 1 and report["frechet"] > 0
    assert report["samples"]["guidance"] == 2 and report["samples"]["weights"] == "ema"
    assert report["samples"]["position"] == 1280 and report["samples"]["uncond_group_size"] == 4


def test_samples_of_an_earlier_checkpoint_go_where_they_are_asked_to(road, tmp_path):
    run, _ = road
    tool("sample", run / "checkpoints/000000000640", "--out", tmp_path / "out", "sample.per_class=4")
    assert json.loads((tmp_path / "out/samples.json").read_text())["position"] == 640
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"samples.npz", "samples.png", "samples.json"}


def test_bad_calls_are_one_line_and_no_traceback(road, tmp_path):
    run, _ = road
    for name, arguments, said in (
        ("sample", [tmp_path], "no complete checkpoint"),
        ("sample", [run, "optim.lr=1"], "optim.lr=1: only sample.*"),
        ("sample", [run, "sample.step=1"], "did you mean sample.steps?"),
        ("evaluate", [tmp_path], "config.yaml"),
        ("submit", [CONFIG, "--nodes", 2, "--slurm", "time=1:00:00"], "--slurm time=1:00:00: write KEY=VALUE"),
        ("submit", [CONFIG, "--nodes", 2, "--cluster", "local", "--procs", 1], "--nodes 2: --cluster local"),
    ):
        error = tool(name, *arguments, code=1).stderr
        assert error.startswith("error: ") and said in error and error.count("\n") == 1


def test_any_number_of_ranks_would_make_the_same_images(tmp_path):
    """Each rank's part on its own (here one after another, so nothing is gathered) against all at once."""
    config = load_config(CONFIG, [*SMALL, "sample.per_class=6", "sample.batch=16"])
    images = open_images("digits")
    network = build_network(config, images)
    torch.manual_seed(0)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    cpu = torch.device("cpu")
    assert generate(network, config, images, Ranks(0, 1, cpu)).shape == (10, 6, 1, 8, 8)
    again = load_config(CONFIG, [*SMALL, "sample.per_class=6", "sample.batch=64"])
    a, b = (generate(network, c, images, Ranks(0, 1, cpu)) for c in (config, again))
    assert torch.allclose(a, b, atol=1e-5), "the number of images at once does not matter"


def test_uint8_and_grid_put_every_pixel_where_it_belongs():
    assert to_uint8(torch.tensor([-2.0, -1, 0, 1, 2]).view(5, 1, 1, 1)).ravel().tolist() == [0, 0, 128, 255, 255]
    images = np.arange(3 * 4 * 2 * 2, dtype=np.uint8).reshape(3, 4, 2, 2, 1)
    picture = grid(images, group_size=2)[..., 0]
    assert picture.shape == (3 * 3 - 1, 4 * 3 - 1 + 2)
    for row in range(3):
        for column in range(4):
            left = column * 3 + (2 if column >= 2 else 0)
            assert (picture[row * 3 : row * 3 + 2, left : left + 2] == images[row, column, ..., 0]).all()


def test_the_readme_names_only_files_that_exist():
    words = Path("README.md").read_text().replace("`", " ").split()
    named = [w for w in words if w.startswith(("configs/", "tools/", "trainer/", "models/", "data/", "slurm/"))]
    assert named and [w for w in named if not Path(w.rstrip(".,:;)")).exists()] == []
