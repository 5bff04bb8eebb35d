"""The networks that sample: from a checkpoint or a file, and those that sample.weaker and sample.small name."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from data.sets.form import ImageForm
from models.sampling.guidance import Networks
from trainer.build import build_network, find_form
from trainer.checkpoints import folder as checkpoint
from trainer.checkpoints.weights import WeightSource, find_checkpoint, find_weights, read_weights, start_from
from trainer.config.tree import Config
from trainer.errors import RunError
from trainer.ranks import local_device
from trainer.run_folder import read_config


def fixed(config: Config) -> Config:
    """Return the config with sample.weaker and sample.small fixed to their present checkpoints: a run still training
    will have newer ones."""
    named = {name: getattr(config.sample, name) for name in ("weaker", "small")}
    found = {name: str(find_weights(path).absolute()) for name, path in named.items() if path}
    return config.model_copy(update={"sample": config.sample.model_copy(update=found)})


class Loaded(NamedTuple):
    """Networks on a device, with the config they are used with and the form of the images they generate."""

    config: Config
    images: ImageForm
    networks: Networks
    device: torch.device

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Surround calls of the networks: no gradients, the config's precision."""
        bf16 = self.config.precision == "bf16"
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            yield


def load(source: WeightSource, config: Config) -> Loaded:
    """Load the network of these weights, and those that sample.weaker and sample.small name with their EMA weights, on
    this process's device. Raise RunError if weights are missing or of another model."""
    images, device = find_form(config, source), local_device()
    network = build_network(config, images)
    if source.file:
        start_from(network, read_weights(source.file, source.part), str(source.file))
    elif source.checkpoint:
        checkpoint.load(source.checkpoint, {source.part: network.state_dict()})  # fills the network's own tensors
    others = [_load_other(name, config, images) for name in ("weaker", "small")]
    ready = network.to(device).eval()
    weaker, small = (other and other.to(device).eval() for other in others)
    return Loaded(config, images, Networks(ready, weaker, small), device)


def _load_other(name: str, config: Config, images: ImageForm) -> nn.Module | None:
    """Return the network that sample.NAME means: of a run or checkpoint, by its own config; of a file, by this one."""
    source = getattr(config.sample, name)
    if source is None:
        return None
    own = read_config(find_checkpoint(Path(source))) if Path(source).is_dir() else config
    if not own.path.same_form(config.path):
        raise RunError(f"sample.{name}={source}: was trained on another path ({own.path.name}); give one on the run's")
    has, needs = own.model.slots, config.model.slots
    size = config.sample.cond_group_size if name == "weaker" else config.sample.group_size
    if has < needs and not (has == 0 and size == 1):  # a plain network ignores slots
        raise RunError(
            f"sample.{name}={source}: has model.max_group_size={has}, the run {needs}; give one with as many or more"
        )
    network = build_network(own, images)
    start_from(network, read_weights(source), str(source))
    return network
