"""The demo's road with a tiny run: submit, sample, evaluate, and what they leave."""

import io
import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data.sets.registry import DataConfig, open_images
from tests.in_process import call
from trainer.build import build_network
from trainer.checkpoints.weights import WeightSource, find_checkpoint
from trainer.config.tree import load_config
from trainer.ranks import Ranks
from trainer.sampling.generate import generate
from trainer.sampling.networks import Networks
from trainer.sampling.pictures import grid, to_uint8
from trainer.sampling.samples import make_samples

CONFIG = "configs/digits.yaml"
SMALL = ["model.depth=1", "model.width=32", "train.images=1280", "train.log_every=128", "train.sample_every=640"]
SMALL += ["sample.steps=2", "checkpoint.every=640", "optim.lr=1e-2", "optim.warmup=0"]  # so the EMA is far behind


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


def test_debug_is_the_same_in_the_users_own_process(tmp_path):
    config = [CONFIG, *SMALL, "train.sample_every=0"]
    for cluster in ("debug", "local"):
        done = tool("submit", "--cluster", cluster, *config, f"run={tmp_path}/{cluster}")
        assert done.stdout == f"finished: {tmp_path}/{cluster}\n"
    assert (tmp_path / "debug/metrics.jsonl").read_text() == (tmp_path / "local/metrics.jsonl").read_text()
    assert not (tmp_path / "debug/logs").exists() and "finished" in tool("submit", "--status", tmp_path).stdout


def test_of_a_sweep_here_all_runs_are_made_also_when_one_fails(tmp_path):
    config = [CONFIG, *SMALL[:2], "train.images=256", "train.sample_every=0", "optim.warmup=0", "train.log_every=128"]
    done = tool("submit", "--procs", 1, *config, "--sweep", "optim.lr=1e30,1e-3", f"run={tmp_path}", code=1)
    assert done.stdout == f"finished: {tmp_path}/optim.lr=1e-3\n" and "not finite" in done.stderr.splitlines()[-1]


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
    assert report["samples"]["guidance"] == [2] and report["samples"]["weights"] == "ema"
    assert report["samples"]["position"] == 1280 and report["samples"]["uncond_group_size"] == 4


def test_samples_of_an_earlier_checkpoint_go_where_they_are_asked_to(road, tmp_path):
    run, _ = road
    call("sample", run / "checkpoints/000000000640", "--out", tmp_path / "out", "sample.per_class=4")
    assert json.loads((tmp_path / "out/samples.json").read_text())["position"] == 640
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"samples.npz", "samples.png", "samples.json"}


def test_bad_calls_are_one_line_and_no_traceback(road, tmp_path):
    run, _ = road
    new = [CONFIG, f"run={tmp_path}/new"]
    for name, arguments, said in (
        ("sample", [tmp_path], "no complete checkpoint"),
        ("sample", [run, "optim.lr=1"], "optim.lr=1: only precision, "),
        ("sample", [run, "sample.step=1"], "did you mean sample.steps?"),
        ("sample", [run, "--procs", 2], "--procs 2: is for --num"),
        ("sample", [run, "--format", "png"], "--format png: is for --num"),
        ("sample", [run, "sample.weaker=nowhere"], "nowhere: no such file or folder"),
        ("evaluate", [tmp_path], "config.yaml"),
        (
            "submit",
            [*new, "--nodes", 2, "--slurm", "time=1:00:00"],
            "--slurm time=1:00:00: Input should be a valid integer",
        ),
        ("submit", [*new, "--nodes", 2, "--cluster", "local", "--procs", 1], "--nodes 2: --cluster local"),
    ):
        error = call(name, *arguments, code=1).err
        assert error.startswith("error: ") and said in error and error.count("\n") == 1


def test_two_sharded_ranks_showed_the_samples_that_one_process_makes_from_the_ema(road):
    """The last grid of training against the last checkpoint; pixels may differ by rounding. Raw weights give others."""
    run, _ = road
    events = EventAccumulator(str(run), size_guidance={"images": 0}).Reload()
    shown = np.asarray(Image.open(io.BytesIO(events.Images("samples")[-1].encoded_image_string))).astype(int)
    config = load_config(run / "config.yaml")
    ema, raw = (make_samples(WeightSource(find_checkpoint(run), part), config)[0] for part in ("ema", "model"))
    difference = {
        name: abs(grid(pixels, 4).squeeze(-1).astype(int) - shown[..., 0])
        for name, pixels in (("ema", ema), ("raw", raw))
    }
    assert difference["ema"].max() <= 1
    assert difference["raw"].mean() > 5


@pytest.mark.parametrize(("per_class", "batch", "steps"), [(6, 16, 2), (4, 1, 1), (5, 6, 1)])
def test_how_many_images_are_made_at_once_does_not_matter(per_class, batch, steps):
    sizes = []

    def count(x, t, label, slot, group_size):
        sizes.append(len(x))
        return network(x, t, label, slot, group_size)

    overrides = [*SMALL, f"sample.per_class={per_class}", f"sample.steps={steps}"]
    configs = [load_config(CONFIG, [*overrides, f"sample.batch={b}"]) for b in (batch, 1000)]
    images = open_images(DataConfig())
    network = build_network(configs[0], images)
    torch.manual_seed(0)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    one, networks = Ranks(0, 1, torch.device("cpu")), Networks(count)
    a, b = (generate(networks, config, images, one)[0] for config in configs)
    assert a.shape == (10, per_class, 1, 8, 8)
    assert torch.allclose(a, b, atol=1e-5)
    assert min(sizes) <= max(batch, 4), "a group is the least that is made at once"
    assert max(sizes[: len(sizes) // 2]) <= max(batch, 4)


def test_uint8_and_grid_put_every_pixel_where_it_belongs():
    assert to_uint8(torch.tensor([-2.0, -1, 0, 1, 2]).view(5, 1, 1, 1)).ravel().tolist() == [0, 0, 128, 255, 255]
    images = np.arange(3 * 4 * 2 * 2, dtype=np.uint8).reshape(3, 4, 2, 2, 1)
    enlarged = grid(images, group_size=2)[..., 0]
    picture = enlarged[::16, ::16]
    assert (enlarged == picture.repeat(16, axis=0).repeat(16, axis=1)).all()
    assert picture.shape == (3 * 3 - 1, 4 * 3 - 1 + 2)
    for row in range(3):
        for column in range(4):
            left = column * 3 + (2 if column >= 2 else 0)
            assert (picture[row * 3 : row * 3 + 2, left : left + 2] == images[row, column, ..., 0]).all()


def test_the_readme_names_only_files_that_exist():
    words = Path("README.md").read_text().replace("`", " ").split()
    folders = ("configs/", "tools/", "tests/", "trainer/", "models/", "data/", "slurm/", "results/")
    named = [w for w in words if w.startswith(folders)]
    assert named and [w for w in named if not list(Path().glob(w.rstrip(".,:;)")))] == []


def test_what_the_readmes_submit_is_accepted(tmp_path, make_latents):
    """Every `submit.py` line of them, with --dry-run: world size, batch and groups fit one another."""
    start = "    .venv/bin/python tools/submit.py "
    text = [line for path in [Path("README.md"), *Path().glob("*/README.md")] for line in path.read_text().splitlines()]
    lines = [
        line.removeprefix(start)
        for line in text
        if line.startswith(start) and not {"--status", "--job"} & set(line.split())
    ]
    assert len(lines) >= 4
    make_latents(tmp_path, number=256, shape=(4, 32, 32), scaling=0.18215, neighbors=64)
    for number in range(64):
        path = tmp_path / f"pictures/{'ab'[number % 2]}/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((32, 32), 64).convert("RGB").save(path)
    call("precompute_pixels", "--images", tmp_path / "pictures", "--out", tmp_path / "pixels", "--size", 32)
    latents = [f"data.latents={tmp_path}/latents", f"data.neighbors={tmp_path}/graph"]
    for line in lines:
        data = latents if "imagenet" in line else [f"data.pixels={tmp_path}/pixels"] if "pictures" in line else []
        assert call("submit", *shlex.split(line, comments=True), "--dry-run", f"run={tmp_path}/run", *data).out
