"""What tests of several folders need."""

import numpy as np
import pytest
import torch
import transformers
from diffusers import AutoencoderKL

from data.neighbors.graph import build_graph
from data.stores.shards import agree_on_settings, finish, shard_names, write_shard


@pytest.fixture(scope="session")
def make_latents():
    """A store of random latents in `folder`/latents and, with `width`, features of that many numbers in /features and
    their neighbour graph in /graph. Images come in `kinds` of which one is like the other."""

    def make(
        folder, number=96, shards=3, shape=(2, 4, 4), classes=3, width=8, neighbors=12, kinds=6, seed=0, scaling=0.5
    ):
        rng = np.random.default_rng([seed, 5])
        label = rng.integers(classes, size=number)
        kind = rng.integers(kinds, size=number)
        moments = rng.normal(size=(number, 2, 2 * shape[0], *shape[1:])).astype(np.float16)
        features = rng.normal(size=(kinds, width))[kind] + 0.2 * rng.normal(size=(number, width))
        features = (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float16)
        vae = {"name": "no/vae", "scaling_factor": scaling, "shift_factor": 0.25}
        for store, name, array, settings in (
            ("latents", "moments", moments, vae),
            ("features", "feature", features, {"name": "no/encoder", "encoder_weights": str(seed)}),
        ):
            agree_on_settings(folder / store, settings)
            for path, part in zip(shard_names(store, shards), np.array_split(np.arange(number), shards), strict=True):
                keys = [f"c{label[i]}/{i:05d}" for i in part]
                write_shard(folder / store / path, keys, label[part].tolist(), {name: array[part]}, [])
            finish(folder / store, store, shards, classes, 0)
        build_graph(folder / "features", folder / "graph", neighbors, "exact", 1, "fp32", "cpu")
        return folder

    return make


@pytest.fixture(scope="session")
def random_weights():
    """Fill all parameters of a module so that signals stay of order 1."""

    def fill(module, seed):
        generator = torch.Generator().manual_seed(seed)
        for parameter in module.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.dim() == 2 else 0.3
            parameter.data.copy_(scale * torch.randn(parameter.shape, generator=generator))
        return module

    return fill


@pytest.fixture(scope="session")
def save_vae(random_weights, tmp_path_factory):
    """Save a small random AutoencoderKL of 8 pixels to a latent; its folder."""

    def save(seed=0, widths=(8, 8, 8, 8), **config):
        blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
        config |= {name: len(widths) * block for name, block in blocks.items()}
        vae = AutoencoderKL(block_out_channels=widths, norm_num_groups=8, **{"latent_channels": 4, **config})
        folder = tmp_path_factory.mktemp("vae")
        random_weights(vae, seed).save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def save_encoder(random_weights, tmp_path_factory):
    """Save a small random image encoder of a kind, with its image processor; its folder."""
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 40}
    vision, text = {**size, "image_size": 28, "patch_size": 14}, {**size, "vocab_size": 9}
    crop, square = {"height": 28, "width": 28}, {"height": 28, "width": 28}
    networks = {
        "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**vision)),
        "clip": lambda: transformers.CLIPModel(
            transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=12)
        ),
        "siglip": lambda: transformers.SiglipModel(
            transformers.SiglipConfig(vision_config=vision, text_config={**text, "projection_size": 32})
        ),
        "siglip_vision": lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**vision)),
        "vit": lambda: transformers.ViTModel(transformers.ViTConfig(**vision)),
        "ijepa": lambda: transformers.IJepaModel(transformers.IJepaConfig(**vision)),
        "resnet": lambda: transformers.ResNetModel(
            transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
        ),
    }
    processors = {
        "dinov2": lambda: transformers.BitImageProcessor(size={"shortest_edge": 32}, crop_size=crop),
        "clip": lambda: transformers.CLIPImageProcessor(size={"shortest_edge": 30}, crop_size=crop),
        "siglip": lambda: transformers.SiglipImageProcessor(size=square),
    }

    def save(kind, seed=0):
        folder = tmp_path_factory.mktemp(kind)
        random_weights(networks[kind](), seed).save_pretrained(folder)
        processors.get(kind, processors["siglip"])().save_pretrained(folder)
        return folder

    return save
