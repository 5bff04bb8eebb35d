"""Makes artefacts.tar.xz with version 0.1.0: `python make.py CHECKOUT_OF_0.1.0` (see README.md)."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import textwrap
from pathlib import Path

import numpy as np

CHECKOUT, ARCHIVE = Path(sys.argv[1]).absolute(), Path(__file__).with_name("artefacts.tar.xz")
OUT = Path("/tmp/v0_1")  # this path stands in what is made
EXPECTED, TEMPORARY = OUT / "expected", OUT / "temporary"
PYTHON = CHECKOUT / ".venv/bin/python"
DIGITS = "configs/digits.yaml"
TWO, ONE = ["--cluster", "local", "--procs", "2"], ["--cluster", "debug"]
TINY = ["model.depth=1", "model.width=8", "model.heads=2", "model.max_group_size=4", "train.global_batch=64"]
TINY += ["optim.lr=1e-2", "optim.warmup=640", "optim.ema=0.9", "train.log_every=640", "train.sample_every=0"]
TINY += ["sample.steps=4", "sample.per_class=4", "checkpoint.keep=1"]
NARROW = ["model.depth=2", "model.width=4", "model.heads=1"]
JIT = ["engine=ddp", "model.backbone=jit", "path=jit", "model.time_scale=1", "model.bottleneck=4", "sample.guidance=1"]
JIT += ["model.context_tokens=2", "model.context_start=1", "groups.variant=full", "groups.size=2", "groups.query=class"]
DDPM = ["engine=deepspeed", "zero=1", "path.name=ddpm", "path.min_snr=5", "model.time_scale=1", "sample.sampler=ddpm"]
DDPM += ["groups.mixing=within_step", "groups.splits=4", "groups.share=0.5", "groups.query=random"]
DDPM += ["deepspeed.gradient_predivide_factor=1.0", "sample.interval=[-6,null]"]
PLAIN = ["engine=single", "path.name=ddpm", "path.learns_variance=false", "model.time_scale=1", "sample.sampler=ddim"]
PLAIN += ["groups.variant=none", "groups.size=1", "model.max_group_size=1"]
LATENTS = ["engine=hsdp", "shard_size=1", "data.name=latents", f"data.latents={OUT / 'latents'}", "data.scaling=0.5"]
LATENTS += [f"data.neighbors={OUT / 'neighbors'}", "model.group_layers=[1]", "path.timesteps=logit_normal"]
LATENTS += ["groups.mixing=within_step", "groups.splits=2", "groups.share=0.5", "groups.size=2", "groups.neighbors=7"]
LATENTS += ["groups.threshold=0.999", "groups.spread=0.1", "groups.window=[null,1]"]
LATENTS += ["train.global_batch=16", "train.log_every=160", "optim.warmup=160"]
CONFIGS = {  # of users
    "pixels": """
        engine: single
        run: /tmp/v0_1/pixels-run
        path: jit
        data: {name: pixels, pixels: /tmp/v0_1/pixels, neighbors: /tmp/v0_1/neighbors, channels: 3, side: 8}
        model: {backbone: jit, depth: 2, width: 8, heads: 2, bottleneck: 4, context_tokens: 2, context_start: 1}
        groups: {variant: full, size: 2, neighbors: 7, threshold: 0.999}
        optim: {lr: 0.01, betas: [0.9, 0.9], weight_decay: 0.1, clip: null, ema: 0.9}
        train: {images: 320, global_batch: 16, micro_batch: 8, log_every: 160, score_every: 160}
    """,
    "streamed": """
        engine: single
        run: /tmp/v0_1/streamed-run
        path: {name: gvp, timesteps: logit_normal, logit_mean: 0.0, logit_std: 1.0}
        data: {name: latents, latents: /tmp/v0_1/clustered, streaming: true, window: 2, scaling: 0.5, flip: false}
        model: {depth: 1, width: 8, heads: 2, mlp_ratio: 2.0, max_group_size: 2}
        groups: {variant: light, size: 2, share: 0.5, mixing: within_step, splits: 1, neighbors: 7, threshold: 0.999}
        optim: {lr: 0.01, ema: 0.9}
        train: {images: 320, global_batch: 8, log_every: 160}
    """,
}
MAKE_INPUTS = """
import sys, torch, numpy as np
from pathlib import Path
from diffusers import AutoencoderKL
from PIL import Image
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model
out, rng = Path(sys.argv[1]), np.random.default_rng(0)
for i in range(24):  # of four kinds
    coarse = np.random.default_rng(i % 4).integers(30, 225, size=(3, 3, 3)) + rng.integers(-30, 30, size=(3, 3, 3))
    path = out / f"images/class{i % 3}/{i:03d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(coarse.clip(0, 255).astype(np.uint8)).resize((8 + i % 2, 8), Image.BICUBIC).save(path)
torch.manual_seed(0)
blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
small = {"block_out_channels": (4, 4), "layers_per_block": 1, "norm_num_groups": 2, "latent_channels": 2}
AutoencoderKL(**blocks, **small, scaling_factor=0.5, shift_factor=0.25).save_pretrained(out / "vae")
dino = Dinov2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
Dinov2Model(dino).save_pretrained(out / "temporary/encoder")
crop = {"height": 28, "width": 28}
BitImageProcessor(size={"shortest_edge": 32}, crop_size=crop).save_pretrained(out / "temporary/encoder")
"""


def tool(name, *arguments):
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [PYTHON, CHECKOUT / f"tools/{name}.py", *arguments]
    print("$", *command[1:], flush=True)
    subprocess.run(list(map(str, command)), cwd=CHECKOUT, env=env, check=True)


def train(name, images, *overrides):
    """A run of the digits' config, without what it does not need to go on, and expected/NAME-samples.npz."""
    run = OUT / name
    tool("submit", DIGITS, f"run={run}", *TINY, *overrides, f"train.images={images}")
    for pattern in ("events.*", "code", "logs", "lock", "job"):
        for path in run.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    tool("sample", run, "--out", TEMPORARY / "samples", "sample.per_class=2")
    np.savez_compressed(EXPECTED / f"{name}-samples.npz", **np.load(TEMPORARY / "samples/samples.npz"))
    return run


def note_losses(run, name):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (EXPECTED / f"{name}.json").write_text(json.dumps([row["loss"] for row in rows]) + "\n")


def go_on(run, images, *overrides):
    """expected/NAME-continued.safetensors and .json: averaged weights and all losses, continued by one process."""
    copy = shutil.copytree(run, TEMPORARY / "goes-on")
    single = ["engine=single", f"train.images={images}", *overrides]
    tool("submit", *ONE, copy / "config.yaml", f"run={copy}", *single)
    tool("export_weights", copy, EXPECTED / f"{run.name}-continued.safetensors")
    note_losses(copy, f"{run.name}-continued")
    shutil.rmtree(copy)


def stores():
    """images and vae, what the tools make of them, and expected/*-run.json: the losses of runs on these."""
    subprocess.run([PYTHON, "-c", MAKE_INPUTS, OUT], check=True)
    common = ["--images", OUT / "images", "--shard-size", 12, "--workers", 0, "--procs", 1]
    tool("precompute_latents", *common, "--out", OUT / "latents", "--vae", OUT / "vae", "--size", 8)
    tool("precompute_features", *common, "--out", OUT / "features", "--encoder", TEMPORARY / "encoder")
    tool("precompute_pixels", *common, "--out", OUT / "pixels", "--size", 8)
    tool("build_neighbors", "--features", OUT / "features", "--out", OUT / "neighbors", "--neighbors", 7, "--procs", 1)
    stores = ["--latents", OUT / "latents", "--features", OUT / "features"]
    tool("cluster_latents", *stores, "--out", OUT / "clustered", "--shard-size", 6, "--procs", 1)
    for name, text in CONFIGS.items():
        (OUT / f"{name}.yaml").write_text(textwrap.dedent(text).lstrip())
        tool("submit", *ONE, OUT / f"{name}.yaml")
        note_losses(OUT / f"{name}-run", f"{name}-run")
        shutil.rmtree(OUT / f"{name}-run")
    shutil.rmtree(OUT / "clustered")


def runs():
    """Five of them, of five engines."""
    more = ["groups.share=0.25", "optim.power_ema=[0.1]", "checkpoint.snapshot_every=1280", "checkpoint.every=1280"]
    run = train("run", 2560, *TWO, *more)
    go_on(run, 3840)
    tool("export_weights", run, EXPECTED / "run.safetensors")
    tool("reconstruct_ema", run, EXPECTED / "run-ema-0.12.safetensors", "--std", "0.12")
    tool("sample", run, "sample.per_class=2")
    (run / "samples.png").unlink()
    many = run / "samples-40"  # of whose three parts the second is still to be made
    tool("sample", run, "--num", 40, "sample.batch=16")
    np.savez_compressed(EXPECTED / "run-samples-40.npz", **np.load(many / "samples.npz"))
    for name in ("samples.npz", "samples.json", "parts/part-000001.npz"):
        (many / name).unlink()

    go_on(train("latents-run", 320, *ONE, *NARROW, *LATENTS), 480, "shard_size=null")
    go_on(train("jit-run", 1920, *ONE, *NARROW, *JIT), 2560)
    go_on(train("ddpm-run", 1280, *ONE, *NARROW, *DDPM), 1920, "deepspeed={}")
    plain = train("plain-run", 1280, *ONE, *NARROW, *PLAIN)
    go_on(plain, 1920)
    tool("export_weights", plain, EXPECTED / "plain-run.safetensors")


def nobodys(member):
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    return member


if __name__ == "__main__":
    OUT.mkdir()
    EXPECTED.mkdir()
    TEMPORARY.mkdir()
    stores()
    runs()
    shutil.rmtree(TEMPORARY)
    with tarfile.open(ARCHIVE, "w:xz", preset=9) as archive:
        for path in sorted(OUT.iterdir()):
            archive.add(path, path.name, filter=nobodys)
    shutil.rmtree(OUT)
