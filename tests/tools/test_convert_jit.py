"""Files of JiT, names that wrappers have left, and the config that is written beside converted weights."""

import argparse
import random

import pytest
import torch
import yaml
from safetensors.torch import load_file

from models.backbones.dit import DiT
from models.backbones.jit import JiT
from models.pretrained.published import convert
from tests.published import CLASSES
from tests.published_jit_module import Denoiser, make_jit
from trainer.build import build_network, open_data
from trainer.checkpoints.weights import export_weights
from trainer.config.tree import load_config
from trainer.loop import train

RANDOM = random.SystemRandom()
RUN = ["engine=single", "path=jit", "train.images=128", "train.sample_every=0", "groups.variant=none", "groups.size=1"]
RUN += ["model.backbone=jit", "model.depth=4", "model.width=24", "model.heads=3", "model.time_scale=1"]
RUN += ["model.context_tokens=4", "model.context_start=1", "model.bottleneck=10", "optim.lr=0.01"]


def wrapped(weights):
    """As DistributedDataParallel and torch.compile, in some order, around the network and its blocks, call them."""
    outer = RANDOM.choice(["module._orig_mod.", "_orig_mod.module.", "_orig_mod.", "module.module._orig_mod."])
    inner = {"blocks.0.": "blocks.0._orig_mod.", "blocks.1.": "blocks.1._orig_mod.module."}

    def name_of(name):
        for bare, full in inner.items():
            name = name.replace(bare, full)
        return outer + name

    return {name_of(name): tensor for name, tensor in weights.items()}


@pytest.mark.parametrize("name", ["sit", "repa", "groupdiff sit", "jit"])
def test_names_of_wrappers_are_dropped_wherever_they_are(name, published, jit, call, error, tmp_path):
    weights = jit()[1] if name == "jit" else published(name)
    for file, contents in (("plain", weights), ("wrapped", wrapped(weights))):
        torch.save({"ema": contents}, tmp_path / f"{file}.pt")
        call("convert_weights", tmp_path / f"{file}.pt", tmp_path / f"{file}.safetensors")
    expected, found = (load_file(tmp_path / f"{file}.safetensors") for file in ("plain", "wrapped"))
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    torch.save(weights | wrapped(weights), tmp_path / "both.pt")
    assert "differ in module and _orig_mod alone" in error(tmp_path / "both.pt", tmp_path / "both.safetensors")


@pytest.fixture
def jit(random_weights, monkeypatch):
    """Make a network of JiT's code, of a size that tells all of it, and its weights as its files name them."""
    values = {"depth": 4, "width": 24, "heads": 3, "bottleneck": 10, "context_start": 1}
    monkeypatch.setitem(JiT.Config.sizes, "tiny", values)
    return lambda: make_jit(RANDOM.randrange(2**31), random_weights, depth=4)


def test_a_checkpoint_of_jit_has_three_networks(jit, call, error, tmp_path):
    parts = {name: jit()[1] for name in ("model", "model_ema1", "model_ema2")}
    arguments = argparse.Namespace(model="JiT-H/16", noise_scale=2.0, proj_dropout=0.2)
    torch.save({**parts, "optimizer": {"state": {}}, "epoch": 9, "args": arguments}, tmp_path / "checkpoint-last.pth")
    for part, options in (("model_ema1", []), *((part, ["--part", part]) for part in parts)):
        out = tmp_path / f"{part}{len(options)}.safetensors"
        printed = call("convert_weights", *options, tmp_path / "checkpoint-last.pth", out)
        expected = convert(parts[part], "jit").weights
        assert all(torch.equal(tensor, expected[key]) for key, tensor in load_file(out).items())
        told = yaml.safe_load(printed.partition("\n")[2])
        assert told["path"] == {"name": "jit", "noise_scale": 2.0} and told["model"]["dropout"] == 0.2
        assert "does not tell" not in printed
    lines = error("--part", "model_ema3", tmp_path / "checkpoint-last.pth", tmp_path / "x.safetensors")
    assert "has no part model_ema3; it has model, model_ema1, model_ema2" in lines


@pytest.mark.parametrize("name", ["jit", "dit", "sit", "repa", "groupdiff sit"])
def test_the_config_beside_the_weights_samples_and_trains(name, published, jit, call, tmp_path, monkeypatch):
    monkeypatch.setitem(DiT.Config.sizes, "tiny", {"depth": 2, "width": 24, "heads": 3})
    torch.save(jit()[1] if name == "jit" else published(name), tmp_path / "weights.pt")
    out, file = tmp_path / "out.safetensors", tmp_path / "out.yaml"
    call("convert_weights", tmp_path / "weights.pt", out)
    config = load_config(file)
    assert config.init_from == str(out) and config.model.size == "tiny" and config.data.pixels == "/data/pixels"
    assert config.sample.guided_channels == (3 if name in ("dit", "sit") else None)
    assert (config.groups.variant, config.groups.size) == (("light", 4) if "groupdiff" in name else ("none", 1))
    samplers = {"dit": ("ddpm", 250, (1.5,)), "repa": ("sde", 250, (1.8,)), "jit": ("heun", 50, (1.5,))}
    sampler, steps, guidance = samplers.get(name, ("sde", 250, (2.585,) if "groupdiff" in name else (1.5,)))
    assert (config.sample.sampler, config.sample.steps, config.sample.guidance) == (sampler, steps, guidance)

    few = ["sample.steps=3", "sample.per_class=4"]
    printed = call("sample", file, "--weights", out, "--out", tmp_path / "samples", *few)
    assert f"{4 * CLASSES} images" in printed
    assert "images" in call("submit", file, "--dry-run", "--classes", CLASSES, "train.global_batch=64", "engine=ddp")


def test_latents_are_those_of_the_published_vae(published, call, tmp_path, monkeypatch):
    monkeypatch.setitem(DiT.Config.sizes, "tiny", {"depth": 2, "width": 24, "heads": 3})
    for name, vae in (("sit", "ft-ema"), ("groupdiff dit", "ft-mse")):
        torch.save(published(name, channels=4, side=4), tmp_path / "weights.pt")
        call("convert_weights", tmp_path / "weights.pt", tmp_path / f"{name[:3]}.safetensors")
        data = load_config(tmp_path / f"{name[:3]}.yaml").data
        assert (data.name, data.channels, data.side, data.scaling) == ("latents", 4, 4, 0.18215)
        assert data.vae == f"stabilityai/sd-vae-{vae}"


def test_the_path_is_that_of_the_arguments(published, call, error, tmp_path):
    for kind, path in (("GVP", "gvp"), ("cosine", "gvp"), ("VP", "vp"), ("Linear", "linear")):
        arguments = argparse.Namespace(path_type=kind, prediction="velocity")
        torch.save({"ema": published("sit"), "args": arguments}, tmp_path / "weights.pt")
        printed = call("convert_weights", tmp_path / "weights.pt", tmp_path / f"{kind}.safetensors")
        assert yaml.safe_load(printed.partition("\n")[2])["path"] == {"name": path}
    for wrong, said in (
        ({"path_type": "ve"}, "path_type=ve: none of linear"),
        ({"prediction": "noise"}, "prediction=noise: only weights that predict the velocity"),
    ):
        torch.save({"ema": published("sit"), "args": argparse.Namespace(**wrong)}, tmp_path / "weights.pt")
        assert said in error(tmp_path / "weights.pt", tmp_path / "x.safetensors")


def test_a_run_of_jit_becomes_a_file_of_jits_code(call, error, tmp_path):
    config = load_config("configs/digits.yaml", [f"run={tmp_path}/run", *RUN])
    train(config)
    export_weights(tmp_path / "run", tmp_path / "ema.safetensors")
    printed = call("convert_weights", "--to", "jit", tmp_path / "ema.safetensors", tmp_path / "checkpoint-last.pth")
    assert "--evaluate_gen" in printed
    stored = torch.load(tmp_path / "checkpoint-last.pth", weights_only=True)
    assert list(stored) == ["model", "model_ema1", "model_ema2"]
    theirs = Denoiser(depth=4, channels=1, side=8, classes=10)
    theirs.load_state_dict(stored["model"])
    network = build_network(config, open_data(config))
    network.load_state_dict(load_file(tmp_path / "ema.safetensors"))
    x, t, label = torch.randn(12, 1, 8, 8), torch.rand(12), torch.arange(12) % 11
    with torch.no_grad():
        expected = network(x, t, label.where(label < 10, torch.tensor(-1)), torch.zeros_like(label))
        largest = max(1, expected.abs().max())
        assert expected.any() and (theirs(x, t, label) - expected).abs().max() < 1e-5 * largest

    printed = call("convert_weights", tmp_path / "checkpoint-last.pth", tmp_path / "again.safetensors")
    assert "# and model.context_start, which the file does not tell" in printed and "model.heads" not in printed
    again, first = load_file(tmp_path / "again.safetensors"), load_file(tmp_path / "ema.safetensors")
    assert again.keys() == first.keys() and all(torch.equal(again[key], first[key]) for key in again)
    assert "must be a new .pth file" in error("--to", "jit", tmp_path / "ema.safetensors", tmp_path / "x.safetensors")
    (tmp_path / "x.yaml").write_text("")
    assert "x.yaml: is there" in error(tmp_path / "checkpoint-last.pth", tmp_path / "x.safetensors")
