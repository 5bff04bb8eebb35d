"""Networks whose every weight is random (a fresh DiT outputs zeros), and inputs for them."""

import pytest
import torch
import transformers
from diffusers import AutoencoderKL

from models.dit import DiT, ModelConfig

SIDE, CHANNELS, CLASSES = 6, 3, 5


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
def random_dit(random_weights):
    """A small DiT with random weights, and how its configuration is changed."""

    def make(seed, **changes):
        config = ModelConfig(**{"depth": 2, "width": 24, "heads": 3, "max_group_size": 8, **changes})
        return random_weights(DiT(config, CHANNELS, SIDE, CLASSES), seed)

    return make


@pytest.fixture(scope="session")
def random_inputs():
    """x, t, label (some of them null), slot (distinct in each group) for `images` images."""

    def make(seed, images, group_size, rows=8):
        generator = torch.Generator().manual_seed(1000 + seed)
        x = torch.randn(images, CHANNELS, SIDE, SIDE, generator=generator)
        t = torch.rand(images, generator=generator)
        label = torch.randint(-1, CLASSES, (images,), generator=generator)
        slots = [torch.randperm(rows, generator=generator)[:group_size] for _ in range(images // group_size)]
        return x, t, label, torch.cat(slots)

    return make


@pytest.fixture(scope="session")
def shuffled_groups():
    """A random order of `images` images that keeps each in its group."""

    def make(seed, images, group_size):
        generator = torch.Generator().manual_seed(2000 + seed)
        return torch.cat(
            [start + torch.randperm(group_size, generator=generator) for start in range(0, images, group_size)]
        )

    return make


@pytest.fixture
def separate_images(monkeypatch):
    """Gives attention a block-diagonal mask, a block for each `tokens` tokens: an image of a group sees only itself."""
    attention = torch.nn.functional.scaled_dot_product_attention

    def install(tokens):
        def masked(q, k, v):
            image = torch.arange(q.shape[-2]) // tokens
            return attention(q, k, v, attn_mask=image[:, None] == image)

        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", masked)

    return install


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
