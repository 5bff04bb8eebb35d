"""Small networks and images for the preprocessing tools."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from diffusers import AutoencoderKL
from PIL import Image

DOWN, UP = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4


def start(name, *arguments, **options):
    """A tool as a process of one thread."""
    command = [sys.executable, f"tools/{name}.py", *map(str, arguments)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


@pytest.fixture(scope="session")
def tool():
    """Run a tool to its end; the exit code must be `code`."""

    def run(name, *arguments, code=0, **options):
        process = start(name, *arguments, **options)
        process.out, process.err = process.communicate(timeout=300)
        assert process.returncode == code, process.out + process.err
        return process

    return run


@pytest.fixture(scope="session")
def start_tool():
    """Start a tool."""
    return start


@pytest.fixture(scope="session")
def make_vae(tmp_path_factory):
    """A small random VAE of 8 pixels to a latent; its folder."""

    def make(seed=0, **config):
        torch.manual_seed(seed)
        folder = tmp_path_factory.mktemp("vae")
        config = {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 8, "latent_channels": 4, **config}
        vae = AutoencoderKL(down_block_types=DOWN, up_block_types=UP, **config)
        for parameter in vae.parameters():
            torch.nn.init.normal_(parameter, std=0.3)  # so that images differ in their moments
        vae.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def vae(make_vae):
    return make_vae()


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    """A small random DINOv2 with its image processor; its folder."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encoder")
    config = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    network = transformers.Dinov2Model(transformers.Dinov2Config(**config))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    network.save_pretrained(folder)
    crop = {"height": 28, "width": 28}
    transformers.BitImageProcessor(size={"shortest_edge": 32}, crop_size=crop).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    """96 random JPEGs, smooth ones, in three class folders."""
    folder = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for i in range(96):
        small = Image.fromarray(rng.integers(256, size=(4, 5, 3), dtype=np.uint8))
        path = folder / f"class{i % 3}/{i:03d}.jpg"
        path.parent.mkdir(exist_ok=True)
        small.resize((int(rng.integers(33, 90)), int(rng.integers(33, 90))), Image.BICUBIC).save(path)
    return folder
