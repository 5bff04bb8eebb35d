"""Networks whose every weight is random (a fresh DiT outputs zeros), and inputs for them."""

import pytest
import torch

from models.backbones.dit import DiT
from models.backbones.jit import JiT, RMSNorm

SIDE, CHANNELS, CLASSES = 6, 3, 5


@pytest.fixture(scope="session")
def random_dit(random_weights):
    """A small DiT with random weights, and how its configuration is changed."""

    def make(seed, **changes):
        config = DiT.Config(**{"depth": 2, "width": 24, "heads": 3, "max_group_size": 8, **changes})
        return random_weights(DiT(config, CHANNELS, SIDE, CLASSES), seed)

    return make


@pytest.fixture(scope="session")
def random_jit(random_weights):
    """A small JiT with random weights, those of its norms around 1; its class joins before block 1 of 0 to 2."""

    def make(seed, **changes):
        sizes = {"depth": 3, "width": 24, "heads": 3, "bottleneck": 10, "context_tokens": 4, "context_start": 1}
        config = JiT.Config(**{"max_group_size": 8, **sizes, **changes})
        net = random_weights(JiT(config, CHANNELS, SIDE, CLASSES), seed)
        for norm in (module for module in net.modules() if isinstance(module, RMSNorm)):
            norm.weight.data += 1
        return net

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
