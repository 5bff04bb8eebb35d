"""Files of published weights become files that a run starts from and samples with, or a folder of diffusers."""

import argparse
import os
import random
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from models.backbones.dit import DiT
from models.pretrained.published import EQUAL, convert
from tests.published import CHANNELS, CLASSES, SIDE, SLOTS
from trainer.build import build_network, check_start, initial_network, open_data
from trainer.checkpoints.weights import export_weights
from trainer.config.tree import load_config
from trainer.loop import train
from trainer.ranks import process_group

RANDOM = random.SystemRandom()
DIGITS = {"channels": 1, "side": 8, "classes": 10}
SMALL = ["engine=single", "model.depth=2", "model.width=24", "model.heads=3", "model.time_scale=1"]
SHORT = ["train.images=128", "train.sample_every=0", "groups.variant=none", "groups.size=1"]


def save(weights, path, wrapper):
    """As published checkpoints hold them."""
    other = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    rest = {"opt": {"state": {}}, "steps": 7, "args": argparse.Namespace(lr=1e-4, z=[768])}
    contents = {
        "flat": weights,
        "ema": {"model": other, "ema": weights, **rest},
        "model_ema": {"model": other, "model_ema": weights, "epoch": 3},
        "module": {"model": {f"module.{name}": tensor for name, tensor in weights.items()}, **rest},
    }
    if path.suffix == ".safetensors":
        save_file(weights, path)
    else:
        torch.save(contents[wrapper], path)


@pytest.mark.parametrize(
    ("name", "file", "wrapper", "path"),
    [
        ("dit", "DiT-XL-2-256x256.pt", "flat", "ddpm"),
        ("sit", "0400000.pt", "ema", "linear"),
        ("sit", "sit.safetensors", None, "linear"),
        ("repa", "last.pt", "ema", "linear"),
        ("repa", "last.pth", "module", "linear"),
        ("groupdiff dit", "gdiff-l-4-dit-xl-2-resume.pth", "model_ema", "ddpm"),
        ("groupdiff sit", "gdiff-l-4-sit-xl-2-repa-resume.pth", "model_ema", "linear"),
        ("repa without projectors", "said.pt", "flat", "linear"),
    ],
)
def test_a_file_becomes_ours_and_says_so(name, file, wrapper, path, published, call, tmp_path):
    kind, weights = name.split()[0], published(name)
    save(weights, tmp_path / file, wrapper)
    said = ["--from", kind] if name == "repa without projectors" or RANDOM.random() < 0.5 else []
    out = tmp_path / "deep/out.safetensors"
    printed = call("convert_weights", *said, tmp_path / file, out)

    expected = convert(weights, kind)
    found = load_file(out)
    assert found.keys() == expected.weights.keys()
    assert all(torch.equal(tensor, expected.weights[key]) for key, tensor in found.items())
    with safe_open(out, "pt") as opened:
        metadata = opened.metadata()
    assert metadata["converted_from"] == f"{kind}, {tmp_path / file}"
    assert yaml.safe_load(metadata["config"]) == expected.config
    assert out.stat().st_mode == (tmp_path / file).stat().st_mode

    first, _, lines = printed.partition("\n")
    assert first == f"{out}: from {kind}, {CLASSES} classes; a config for it has"
    whole = out.with_suffix(".yaml")
    end = f"# and model.heads, which the file does not tell\n# {whole}: the whole config, for tools/submit.py and"
    assert lines == f"{metadata['config']}{end} tools/sample.py\n"
    assert "# model.heads: set it; the file did not tell\n" in whole.read_text()
    assert whole.stat().st_mode == out.stat().st_mode
    told = yaml.safe_load(lines)
    assert told["path"]["name"] == path and told["data"] == {"channels": CHANNELS, "side": SIDE}
    assert told["model"]["time_scale"] == 1 and told["model"]["max_group_size"] == (SLOTS if kind == "groupdiff" else 0)


@pytest.mark.parametrize("name", ["repa", "dit"])
def test_a_run_starts_from_the_file_and_sample_takes_it(name, published, call, tmp_path):
    save(published(name, **DIGITS), tmp_path / "last.pt", "ema")
    out, run = tmp_path / "out.safetensors", tmp_path / "run"
    told = yaml.safe_load(call("convert_weights", tmp_path / "last.pt", out).partition("\n")[2])
    ddpm = ["sample.sampler=ddim"] if told["path"]["name"] == "ddpm" else []
    lines = [f"path.{key}={value}" for key, value in told["path"].items()] + ddpm
    config = load_config("configs/digits.yaml", [f"run={run}", *SMALL, *SHORT, *lines, f"init_from={out}"])
    images = open_data(config)
    assert told["data"] == {"channels": images.shape[0], "side": images.shape[-1]}
    with process_group():
        check_start(config, images)
        state = initial_network(config, images).state_dict()
    found = load_file(out)
    assert found.keys() == state.keys() and all(torch.equal(state[key], tensor) for key, tensor in found.items())

    assert train(config) == "finished"
    few = ["sample.steps=2", "sample.per_class=1"]
    printed = call("sample", run, "--weights", out, *few)
    assert "10 images" in printed and (run / "samples.png").is_file()


def transformer_of(folder):
    from diffusers import DiTTransformer2DModel

    transformer = DiTTransformer2DModel.from_pretrained(folder, local_files_only=True).eval()
    assert transformer.config.sample_size and transformer.config.norm_eps == 1e-6
    return transformer


@pytest.mark.parametrize(("learns", "slots"), [(True, 0), (False, 1)])
def test_an_exported_run_becomes_a_folder_of_diffusers(learns, slots, call, tmp_path):
    overrides = ["path.name=ddpm", f"path.learns_variance={learns}", "sample.sampler=ddim"]
    overrides += [f"model.max_group_size={slots}"]
    config = load_config("configs/digits.yaml", [f"run={tmp_path}/run", *SMALL, *SHORT, *overrides, "optim.lr=0.01"])
    train(config)
    export_weights(tmp_path / "run", tmp_path / "ema.safetensors")
    printed = call("convert_weights", "--to", "diffusers", tmp_path / "ema.safetensors", tmp_path / "dit")
    assert sorted(path.name for path in (tmp_path / "dit").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dit", "ema.safetensors", "run"]
    assert EQUAL in printed.splitlines() and "which is 10 here" in printed
    transformer = transformer_of(tmp_path / "dit")
    exec(EQUAL, {"transformer": transformer})
    network = build_network(config, open_data(config))
    network.load_state_dict(load_file(tmp_path / "ema.safetensors"))
    x, t, label = torch.randn(12, 1, 8, 8), torch.randint(1000, (12,)).float(), torch.arange(12) % 11
    ours = label.where(label < 10, torch.tensor(-1))
    with torch.no_grad():
        expected = network(x, t, ours, torch.zeros_like(label))
        found = transformer(x, t, label).sample
    assert expected.abs().max() > 0 and (found - expected).abs().max() < 1e-5 * max(1, expected.abs().max())


def test_a_run_exported_by_an_older_version_becomes_a_folder_of_diffusers(call, tmp_path):
    overrides = ["path.name=ddpm", "sample.sampler=ddim", "model.max_group_size=1"]
    config = load_config("configs/digits.yaml", [f"run={tmp_path}/run", *SMALL, *SHORT, *overrides])
    tree = config.model_dump(mode="json")
    tree["path"]["noise_scale"] = 1.0  # 0.1 wrote the fields of all paths, and not the form of the images
    save_file(
        build_network(config, open_data(config)).state_dict(),
        tmp_path / "old.safetensors",
        {"config": yaml.safe_dump(tree)},
    )
    call("convert_weights", "--to", "diffusers", tmp_path / "old.safetensors", tmp_path / "dit")
    assert transformer_of(tmp_path / "dit").config.sample_size == 8


def test_published_weights_become_a_pipeline_of_diffusers(published, call, save_vae, tmp_path, monkeypatch):
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline

    monkeypatch.setitem(DiT.Config.sizes, "tiny", {"depth": 2, "width": 24, "heads": 3})
    save(published("dit", channels=4, side=4, classes=1000), tmp_path / "dit.pt", "flat")
    printed = call("convert_weights", tmp_path / "dit.pt", tmp_path / "dit.safetensors")
    assert yaml.safe_load(printed.partition("\n")[2])["model"]["size"] == "tiny" and "heads" not in printed
    folders = [tmp_path / "direct", tmp_path / "in two steps"]
    for source, folder in zip(("dit.pt", "dit.safetensors"), folders, strict=True):
        assert "guidance_scale" not in call("convert_weights", "--to", "diffusers", tmp_path / source, folder)
    direct, in_two = (load_file(folder / "diffusion_pytorch_model.safetensors") for folder in folders)
    modes = {file.stat().st_mode for file in (*folders[0].iterdir(), tmp_path / "dit.pt")}
    assert len(modes) == 1
    assert direct.keys() == in_two.keys() and all(torch.equal(tensor, in_two[key]) for key, tensor in direct.items())

    vae = AutoencoderKL.from_pretrained(save_vae(), local_files_only=True)
    pipeline = DiTPipeline(transformer=transformer_of(folders[0]), vae=vae, scheduler=DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline([1, 999], num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 32, 32, 3) and images.std() > 0


class Code:
    """Unpickled, it would make a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_bad_files_are_one_line(published, error, tmp_path):
    out, file = tmp_path / "out.safetensors", tmp_path / "weights.pt"
    assert "no such file or folder" in error(file, out)
    file.write_text("weights\n")
    assert f"{file}: damaged" in error(file, out)
    torch.save({"model": {"a": torch.zeros(2)}, "args": argparse.Namespace(x=Code(tmp_path / "made"))}, file)
    assert "refused, for posix.mkdir in it would execute code" in error(file, out)
    torch.save({"conv1.weight": torch.zeros(2)}, file)
    assert "x_embedder.proj.weight is missing: not weights of dit, sit, repa, groupdiff or jit" in error(file, out)
    (tmp_path / "run").mkdir()
    assert "a folder; give a file" in error(tmp_path / "run", out)

    weights = published("dit")
    save({**weights, "cross_attn.q.weight": torch.zeros(2)}, file, "flat")
    assert f"{file}: cross_attn.q.weight is unexpected in weights of dit" in error(file, out)
    save({**weights, "final_layer.linear.bias": torch.zeros(2)}, file, "flat")
    assert "final_layer.linear.bias is (2,), must be (24,)" in error(file, out)
    save({**weights, "blocks.1.attn.qkv.bias": torch.zeros(2)}, file, "flat")
    assert "blocks.1.attn.qkv.bias is (2,), must be (72,)" in error(file, out)
    save({name: tensor for name, tensor in weights.items() if name != "blocks.0.mlp.fc2.bias"}, file, "flat")
    assert "blocks.0.mlp.fc2.bias is missing in these weights of dit" in error(file, out)
    save({**weights, "pos_embed": weights["pos_embed"].flip(1)}, file, "flat")
    assert "of another resolution" in error(file, out)
    save(published("sit of one half"), file, "flat")
    assert "say --from which it is" in error(file, out)


def test_contradictions_are_one_line(published, error, call, tmp_path):
    out, file, folder = tmp_path / "out.safetensors", tmp_path / "weights.pt", tmp_path / "folder"
    save(published("repa"), file, "flat")
    assert "projectors.0.0.weight is unexpected in weights of dit" in error("--from", "dit", file, out)
    assert "names begin with denoiser." in error("--from", "groupdiff", file, out)
    assert "does not say of which config" in error("--from", "ours", "--to", "diffusers", file, folder)
    with pytest.raises(SystemExit):
        call("convert_weights", "--from", "jit", file, out)
    assert "ends in .safetensors" in error(file, tmp_path / "out.pt")
    call("convert_weights", file, out)
    assert "must be a new file" in error(file, out)
    assert "must be a new folder" in error("--to", "diffusers", file, out)
    assert "has our names already" in error(out, tmp_path / "again.safetensors")
    assert "weights of sit have a convolution" in error("--from", "sit", out, tmp_path / "again.safetensors")
    save_file(load_file(out), tmp_path / "bare.safetensors")
    assert "does not say of which config" in error("--to", "diffusers", tmp_path / "bare.safetensors", folder)


def test_what_cannot_be_a_folder_of_diffusers_is_one_line(published, error, tmp_path):
    file, folder = tmp_path / "weights.safetensors", tmp_path / "folder"
    for name, said in (
        ("sit", "path=linear: diffusers' DiT is for ddpm"),
        ("groupdiff dit", "model.max_group_size=4: "),
    ):
        ours, config = convert(published(name), name.split()[0])
        save_file(ours, file, {"config": yaml.safe_dump(config)})
        assert "no published size, so the heads are not known" in error("--to", "diffusers", file, folder)
        config["model"]["heads"] = 3
        save_file(ours, file, {"config": yaml.safe_dump(config)})
        assert said in error("--to", "diffusers", file, folder)
    ours, config = convert({k: t for k, t in published("dit").items() if k != "pos_embed"}, "dit")
    config["model"]["heads"] = 3
    save_file(ours, file, {"config": yaml.safe_dump(config)})
    assert "the side of its images is not known" in error("--to", "diffusers", file, folder)
    for wrong in ("a: [", "3", yaml.safe_dump({"path": "ddpm"})):
        save_file(ours, file, {"config": wrong})
        error("--to", "diffusers", file, folder)
    config["model"]["heads"] = 7
    save_file(ours, file, {"config": yaml.safe_dump(config)})
    assert "must be a multiple of heads=7" in error("--to", "diffusers", file, folder)
