"""From JPEGs to samples by the tools alone, as in the README, only smaller: latents, features, neighbours, training."""

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import sklearn.datasets
import torch
import yaml
from diffusers import AutoencoderKL
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

from data.neighbors.graph import open_graph
from tests.in_process import call
from tests.patience import PATIENCE
from trainer.config.tree import load_config
from trainer.loop import train

CLASSES, EACH = ("blossom", "roof", "sky"), 80
CONFIG = {
    "data": {"name": "latents", "channels": 4, "side": 8, "scaling": 0.18215},
    "model": {"depth": 2, "width": 64, "heads": 2, "patch": 2, "max_group_size": 4},
    "groups": {"variant": "light", "size": 4, "share": 0.5, "mixing": "within_step", "splits": 2, "neighbors": 12},
    "optim": {"lr": 2e-3, "ema": 0.9},
    "train": {"images": 3200, "global_batch": 64, "log_every": 640, "sample_every": 1600},
    "checkpoint": {"every": 1600, "keep": 2},
    "sample": {"steps": 2, "per_class": 4},
}


def start(name, *arguments):
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, f"tools/{name}.py", *map(str, arguments)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def end(process):
    out, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    return out


def photos(folder):
    """Random cut-outs of two photographs, of three kinds, as JPEGs in class folders."""
    rng = np.random.default_rng(0)
    china, flower = (Image.fromarray(image) for image in sklearn.datasets.load_sample_images().images)
    whole = {"blossom": flower, "roof": china.crop((0, 150, 640, 427)), "sky": china.crop((150, 0, 640, 130))}
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
        for i in range(EACH):
            width, height = rng.integers(66, 125, size=2)
            left, top = (int(rng.integers(0, most)) for most in np.subtract(whole[name].size, (width, height)))
            cut = whole[name].crop((left, top, left + int(width), top + int(height)))
            cut.save(folder / name / f"{i:03d}.jpg", quality=90)
    return folder


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    """The folder where the tools left images, vae, encoder, latents, features, graph and clustered; what they said."""
    root = tmp_path_factory.mktemp("road")
    photos(root / "images")
    torch.manual_seed(0)
    down, up = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    small = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 8, "latent_channels": 4}
    AutoencoderKL(down_block_types=down, up_block_types=up, **small).save_pretrained(root / "vae")
    dino = Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(dino).save_pretrained(root / "encoder")
    crop = {"height": 28, "width": 28}
    BitImageProcessor(size={"shortest_edge": 32}, crop_size=crop).save_pretrained(root / "encoder")

    common = ["--images", root / "images", "--shard-size", 100, "--workers", 0, "--procs", 1]
    latents = start("precompute_latents", "--out", root / "latents", "--vae", root / "vae", "--size", 64, *common)
    features = start("precompute_features", "--out", root / "features", "--encoder", root / "encoder", *common)
    said = [end(latents), end(features)]
    neighbors = ["--features", root / "features", "--out", root / "graph", "--neighbors", 16]
    clusters = ["--latents", root / "latents", "--features", root / "features", "--out", root / "clustered"]
    said += [call("build_neighbors", *neighbors).out, call("cluster_latents", *clusters, "--shard-size", 48).out]
    return root, said


def write_config(road, name, data, **changes):
    """A YAML file in which nine of ten images have three others that are similar enough."""
    similarities = open_graph(road / "graph")[0].similarities.astype(np.float64)
    config = CONFIG | {name: CONFIG[name] | change for name, change in changes.items()}
    config["data"] = CONFIG["data"] | data
    config["groups"] = config["groups"] | {"threshold": float(np.quantile(similarities[:, 8], 0.1))}
    path = road / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config | {"run": str(road / name)}))
    return path


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def check_losses(rows, steps):
    losses = [row["loss"] for row in rows]
    assert len(losses) == steps and np.isfinite(losses).all()
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    groups = 64 * 0.5 / 4 * steps
    assert all(row["grouped"] == 0.5 for row in rows) and sum(row["fallbacks"] for row in rows) < 0.2 * groups


def test_from_jpegs_to_decoded_samples_by_the_tools(road):
    root, said = road
    number = len(CLASSES) * EACH
    assert all(f"complete, {number} images" in words for words in said)
    assert "recall of the 16 nearest: 1.0000" in said[2]
    for kind in ("latents", "features", "clustered"):
        manifest = json.loads((root / kind / "manifest.json").read_text())
        assert manifest["images"] == number and manifest["num_classes"] == 3 and manifest["rejected"] == 0
        assert all((root / kind / shard["name"]).is_file() for shard in manifest["shards"])
    assert manifest["fields"]["moments"]["shape"] == [2, 8, 8, 8] and manifest["fields"]["feature"]["shape"] == [32]

    config = write_config(root, "run", {"latents": str(root / "latents"), "neighbors": str(root / "graph")})
    run = root / "run"
    assert f"finished: {run}" in end(start("submit", "--cluster", "local", "--procs", 2, config))
    check_losses(metrics(run), 50)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["000000001600", "000000003200"]
    events = EventAccumulator(str(run), size_guidance={"images": 0}).Reload()
    assert [event.step for event in events.Images("samples")] == [1600, 3200]
    shown = Image.open(io.BytesIO(events.Images("samples")[-1].encoded_image_string))
    width, height = 4 * 64 + 3, 3 * 64 + 2  # a line between two
    assert shown.mode == "RGB" and shown.size[0] / shown.size[1] == width / height and shown.size[0] % width == 0

    assert "12 images" in end(start("sample", run, "sample.guidance=2"))
    arrays = np.load(run / "samples.npz")
    assert arrays["arr_0"].shape == (12, 64, 64, 3) and arrays["arr_0"].dtype == np.uint8
    assert arrays["arr_1"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert len(np.unique(arrays["arr_0"])) > 10
    picture = Image.open(run / "samples.png")
    assert picture.mode == "RGB" and picture.size == (width, height)
    np.testing.assert_array_equal(np.asarray(picture)[:64, :64], arrays["arr_0"][0])
    np.testing.assert_array_equal(np.asarray(picture)[-64:, -64:], arrays["arr_0"][-1])


def test_streamed_from_shards_of_similar_images_without_a_graph(road):
    root, _ = road
    data = {"latents": str(root / "clustered"), "streaming": True, "window": 2, "workers": 1}
    config = write_config(root, "streamed", data, train={"images": 1600, "sample_every": 0})
    assert train(load_config(config, ["engine=single"])) == "finished"
    check_losses(metrics(root / "streamed"), 25)
    assert sorted(path.name for path in (root / "streamed/checkpoints").iterdir()) == ["000000001600"]
