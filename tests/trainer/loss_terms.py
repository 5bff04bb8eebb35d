"""A loss term with a head, for runs on real ranks."""

from torch import nn

from models.objectives.registry import TERMS
from models.objectives.term import Term
from models.paths.base import mean_of_image
from tests.trainer.forked import train_tiny


class Early(Term):
    """Read the clean image, patch by patch, from the outputs of both blocks."""

    hidden = (0, 1)

    def __init__(self, config, network, extra):
        super().__init__(config, network, extra)
        width, patch = network.config.width, network.config.patch
        self.patch, self.modules = patch, nn.Sequential(nn.Linear(width, 24), nn.SiLU(), nn.Linear(24, patch**2))

    def __call__(self, forward, batch, path):
        images, _, side, _ = batch.x.shape
        cells, patch = side // self.patch, self.patch
        x = batch.x.view(images, cells, patch, cells, patch).transpose(2, 3).reshape(images, cells**2, patch**2)
        return mean_of_image((self.modules(forward.hidden[0] + forward.hidden[1]).float() - x).square())


def train_early(*overrides):
    TERMS["early"] = Early
    train_tiny(*overrides)
