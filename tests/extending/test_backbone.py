"""A backbone: attention between the patches of a group, nothing else. It is this file, and one line in BACKBONES."""

import pytest
from pydantic import Field
from torch import nn

from models.backbones.attention import GroupAttention
from models.backbones.base import Backbone, BackboneConfig
from models.backbones.dit import unpatchify
from models.backbones.embeddings import LabelEmbedder, PatchEmbedder, SampleEmbedder, TimestepEmbedder
from models.backbones.registry import BACKBONES
from tests.extending.toy import tiny, train_resume_and_sample
from trainer.errors import RunError


class Toy(Backbone):
    class Config(BackboneConfig):
        backbone: str = "toy"
        """The network's architecture."""
        gain: float = Field(1.0, gt=0)
        """Factor on what is predicted."""

    def __init__(self, config, channels, side, num_classes, out_channels=None):
        super().__init__(config, channels, side, num_classes, out_channels)
        self.tokens = (side // config.patch) ** 2
        self.patches = PatchEmbedder(config.patch, channels, config.width)
        self.time, self.label = TimestepEmbedder(config.width), LabelEmbedder(num_classes, config.width)
        self.slot = SampleEmbedder(config.slots, config.width)
        self.blocks = nn.ModuleList(GroupAttention(config.width, config.heads) for _ in range(config.depth))
        self.last = nn.Linear(config.width, config.patch**2 * self.out_channels)

    def forward(self, x, t, label, slot, group_size=1, grouped=None):
        tokens = self.patches(x) + (self.time(t) + self.label(label) + self.slot(slot))[:, None]
        for block in self.blocks:
            tokens = tokens + block(tokens, group_size, grouped)
        return self.config.gain * unpatchify(self.last(tokens), self.config.patch)


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(BACKBONES, "toy", Toy)


def test_a_toy_backbone_trains_resumes_and_samples(tmp_path):
    weights, _ = train_resume_and_sample(tmp_path, "model.backbone=toy", "model.gain=2", "train.attention_every=64")
    assert "slot.embedding_table.weight" in weights


def test_its_fields_are_its_own(tmp_path):
    with pytest.raises(RunError, match=r"^model\.gain=2: is for backbone=toy; leave it out"):
        tiny(tmp_path, "model.gain=2")
    with pytest.raises(RunError, match=r"^model\.gain=-1: input should be greater than 0"):
        tiny(tmp_path, "model.backbone=toy", "model.gain=-1")
    with pytest.raises(RunError, match=r"^model\.bottleneck=9: is for backbone=jit; leave it out"):
        tiny(tmp_path, "model.backbone=toy", "model.bottleneck=9")
    with pytest.raises(RunError, match=r"^model\.backbone=unet: input should be 'dit', 'jit' or 'toy'"):
        tiny(tmp_path, "model.backbone=unet")
