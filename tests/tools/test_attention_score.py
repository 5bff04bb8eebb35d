"""The tool on runs of a few steps: real checkpoints, its JSON and its pictures."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from data.neighbors.clusters import cluster_latents
from models.backbones.attention_mass import observing
from models.paths.registry import make_path, path_config
from tools.attention_score import main
from trainer.analysis import attention as attention_checkpoint
from trainer.analysis.attention import data_attention, draw_groups, load_grouped, one_group, sampling_attention
from trainer.analysis.attention_plots import MOST_LAYERS, level_map, patch_map, picture
from trainer.checkpoints.weights import WeightSource, find_checkpoint
from trainer.config.tree import load_config
from trainer.errors import RunError
from trainer.loop import train

CONFIG = "tests/trainer/tiny.yaml"
BASE = [
    "engine=single",
    "train.images=128",
    "groups.size=4",
    "groups.splits=4",
    "optim.lr=1e-2",
    "groups.threshold=0.6",
]
JIT = ["model.backbone=jit", "model.context_tokens=3", "model.context_start=1", "path=jit"]
PICTURES = ("attention_score.png", "attention_images.png", "attention_patch.png")


@pytest.fixture(scope="module")
def make_run(tmp_path_factory):
    """A trained run, by its overrides."""
    made = {}

    def make(*overrides):
        if overrides not in made:
            folder = tmp_path_factory.mktemp("run")
            config = load_config(CONFIG, [*BASE, f"run={folder}", *overrides])
            train(config)
            made[overrides] = folder, config
        return made[overrides]

    return make


def loaded(run):
    folder, config = run
    return load_grouped(WeightSource(find_checkpoint(folder)), config)


@pytest.mark.parametrize(
    ("place", "arguments"), [("similarity", []), ("class", ["--query", "class", "--patch", "2", "1", "0", "3"])]
)
def test_the_tool_writes_numbers_and_pictures(make_run, capsys, place, arguments):
    folder, _ = make_run()
    main([str(folder), "--groups", "60", *arguments])
    out = capsys.readouterr().out
    record = json.loads((folder / "attention" / place / "attention_score.json").read_text())
    assert record["query"] == place and record["during"] == "data" and record["weights"] == "ema"
    assert record["groups"] == sum(record["groups_by_level"]) == 60 and record["position"] == 128
    assert record["group_size"] == 4 and record["uniform_cross_share"] == 0.75
    assert 0 < record["s_cross"] < 2 / 3 and 0.5 < record["cross_share"] < 1
    assert f"S_cross {record['s_cross']:.4f}, cross share {record['cross_share']:.4f}" in out
    s_cross, counts = np.array(record["s_cross_by_layer_and_level"], float), np.array(record["groups_by_level"])
    assert s_cross.shape == (2, 7) == (2, len(record["log_snr"]))
    assert np.nansum(s_cross * counts) / (2 * 60) == pytest.approx(record["s_cross"], abs=1e-6)
    for name in PICTURES:
        pixels = np.asarray(Image.open(folder / "attention" / place / name).convert("RGB"))
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20


def test_while_sampling(make_run):
    folder, config = make_run()
    main([str(folder), "--groups", "10", "--during", "sampling"])
    record = json.loads((folder / "attention/sampling/attention_score.json").read_text())
    evaluations = 2 * config.sample.steps  # heun's
    assert sum(record["groups_by_level"]) == 10 * evaluations and record["groups"] == 10
    assert record["groups_by_level"][0] == record["groups_by_level"][-1] == 10  # the first from noise, the last at data
    assert record["sample"]["uncond_group_size"] == 4 and 0 < record["s_cross"] < 2 / 3


def test_both_kinds_of_groups_count_while_sampling(make_run):
    folder, config = make_run()
    sample = config.sample.model_copy(update={"cond_group_size": 2})
    measured = sampling_attention(loaded((folder, config.model_copy(update={"sample": sample}))), 10)
    assert measured.groups.sum() == 4 * 10 * (1 + 2)  # groups of 4, and of 2


@pytest.mark.parametrize("query", ["similarity", "class", "random"])
def test_groups_are_those_of_the_query(make_run, query):
    _, config = make_run()
    groups = draw_groups(config.model_copy(update={"groups": config.groups.model_copy(update={"query": query})}), 40)
    assert groups.numbers.shape == (40, 4) and len(np.unique(groups.numbers)) == 160 and groups.fallbacks == 0
    label, features = groups.source.label[groups.numbers], groups.source.features[groups.numbers]
    unit = features / np.linalg.norm(features, axis=-1, keepdims=True)
    cosines = np.einsum("gd,gnd->gn", unit[:, 0], unit)
    assert ((cosines >= 0.6 - 1e-6).all(), (label == label[:, :1]).all()) == {
        "similarity": (True, False),
        "class": (False, True),
        "random": (False, False),
    }[query]
    assert len(draw_groups(config, 10**6).numbers) == len(groups.source) // 4


@pytest.mark.parametrize("overrides", [(), tuple(JIT)])
def test_one_group_is_shown_as_its_attention_is(make_run, overrides, monkeypatch):
    """P is the mean of the whole matrix's blocks at each level; the patch's row of it is a distribution over tokens."""
    run = make_run(*overrides)
    about, whole = loaded(run), []

    def watching(network, see):
        def both(layer, q, k):
            attention = (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1)
            whole.append(attention.mean(dim=(0, 1)))
            see(layer, q, k)

        return observing(network, both)

    monkeypatch.setattr(attention_checkpoint, "observing", watching)
    shown = one_group(about, draw_groups(about.config, 20), (7, 1, 2, 3), -1.0)
    levels, layers = len(shown.levels), 2
    assert shown.mass.shape == (levels, 4, 4) and shown.patch.shape == (layers, 4, 4, 4)
    assert len(whole) == (levels + 1) * layers
    blocks = [layer.unflatten(0, (4, -1)).unflatten(-1, (4, -1)).sum(dim=-1).mean(dim=1) for layer in whole]
    expected = torch.stack(blocks[:-layers]).view(levels, layers, 4, 4).mean(dim=1)
    assert shown.mass == pytest.approx(expected.numpy(), abs=1e-5)
    for layer, attention in enumerate(whole[-layers:]):
        tokens = len(attention) // 4
        context = 3 if overrides and layer == 1 else 0
        assert tokens == 16 + context
        row = attention[1 * tokens + context + 2 * 4 + 3].view(4, tokens)
        assert shown.patch[layer] == pytest.approx(row[:, context:].view(4, 4, 4).numpy(), abs=1e-6)

    assert shown.pixels.shape == (4, 8, 8, 1) and shown.pixels.dtype == np.uint8
    path = make_path(path_config({"name": "jit" if overrides else "linear"}))
    assert (np.diff(shown.levels) > 0).all() and np.abs(shown.levels - attention_checkpoint.LEVELS).max() < 0.1
    assert shown.level == pytest.approx(-1, abs=0.05) and path.name == run[1].path.name


def test_layers_without_groups_are_left_out_of_the_pictures(make_run):
    about = loaded(make_run("model.depth=3", "model.group_layers=[0,2]"))
    groups = draw_groups(about.config, 20)
    measured, shown = data_attention(about, groups), one_group(about, groups, (0, 0, 0, 0), 0.0)
    assert measured.s_cross[1].isnan().all() and not measured.s_cross[::2, measured.groups > 0].isnan().any()
    assert np.isnan(shown.patch).all(axis=(1, 2, 3)).tolist() == [False, True, False] and np.isfinite(shown.mass).all()
    figure = patch_map(shown, 0, 0, 0)
    labels = [axes.get_ylabel() for axes in figure.axes if axes.get_ylabel().startswith("layer")]
    assert labels == ["layer 0", "layer 2"] and MOST_LAYERS >= 2
    assert picture(level_map(measured, 4)).shape[-1] == 3


def test_a_window_leaves_the_other_levels_empty(make_run):
    about = loaded(make_run("groups.window=[-1,1]"))
    measured = data_attention(about, draw_groups(about.config, 60))
    assert measured.groups[3] > 0 and measured.groups.sum() == measured.groups[3] and measured.mean_s_cross > 0


@pytest.mark.parametrize("store", ["latents", "clustered"])
def test_latents_by_number_and_streamed(make_latents, save_vae, tmp_path, store):
    """A DDPM on latents, shown by a VAE; streamed, the groups are of the window's images."""
    make_latents(tmp_path)
    cluster_latents(tmp_path / "latents", tmp_path / "features", tmp_path / "clustered", 16)
    data = ["data.name=latents", f"data.latents={tmp_path}/{store}", f"data.vae={save_vae(latent_channels=2)}"]
    data += ["data.streaming=true", "data.window=2"] if store == "clustered" else [f"data.neighbors={tmp_path}/graph"]
    path = ["path=ddpm", "sample.sampler=ddim", "groups.neighbors=12"]
    config = load_config(CONFIG, [*BASE, *data, *path, f"run={tmp_path}/run"])
    train(config)
    about = loaded((tmp_path / "run", config))
    groups = draw_groups(about.config, 5)
    assert len(groups.source.label) == (32 if store == "clustered" else 96)
    measured, shown = data_attention(about, groups), one_group(about, groups, (4, 3, 1, 1), 0.0)
    assert measured.groups.sum() == 5 and 0 < measured.mean_s_cross < 2 / 3
    assert shown.pixels.shape == (4, 32, 32, 3) and shown.patch.shape == (2, 4, 2, 2)
    assert (shown.label == groups.source.label[groups.numbers[4]]).all()
    assert np.abs(shown.levels - attention_checkpoint.LEVELS).max() < 0.1


def test_batches_do_not_matter(make_run):
    folder, config = make_run()
    small = config.model_copy(update={"sample": config.sample.model_copy(update={"batch": 12})})
    whole, parts = (loaded((folder, one)) for one in (config, small))
    for a, b in zip(
        data_attention(whole, draw_groups(whole.config, 50)),
        data_attention(parts, draw_groups(parts.config, 50)),
        strict=True,
    ):
        torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=0, atol=1e-5, equal_nan=True)


def test_wrong_runs_and_options_are_one_line(make_run, tool, capsys, tmp_path):
    folder, config = make_run()
    alone, _ = make_run("groups={variant: none, size: 1}")
    refused = tool("attention_score", alone, code=1).err.strip()
    assert refused == "error: groups.size=1: a run without groups; give one with groups of 2 or more"
    moved = shutil.copytree(find_checkpoint(folder), tmp_path / "moved")
    for arguments, said in (
        ((folder, "--patch", 0, 4, 0, 0), "patch: image 4 is not there; choose from 0 to 3"),
        ((moved,), "not in a run folder; say where to write with --out"),
    ):
        with pytest.raises(RunError, match=said):
            main([str(argument) for argument in arguments])
    for arguments, said in ((["--groups", "0"], "must be 1 or more"), (["--query", "nearest"], "invalid choice")):
        with pytest.raises(SystemExit):
            main([str(folder), *arguments])
        assert said in capsys.readouterr().err.splitlines()[-1]

    no_layers = config.model_copy(update={"model": config.model.model_copy(update={"group_layers": ()})})
    with pytest.raises(RunError, match=r"model.group_layers=\[\]: no layer of this run has groups"):
        loaded((folder, no_layers))
    unguided = config.model_copy(update={"sample": config.sample.model_copy(update={"guidance": (1.0,)})})
    with pytest.raises(RunError, match=r"sample.uncond_group_size=4: no image sees another while sampling"):
        sampling_attention(loaded((folder, unguided)), 4)
