"""What a network is and computes, whatever it runs on.

- FLOPs: multiply-adds of a forward pass counted by fvcore (attention of the groups included), times 2 for FLOPs; twice
  as many for the backward pass (Kaplan et al. 2020, "Scaling Laws for Neural Language Models", section 2.1). A
  recomputed block passes forward twice.
- Kernels: one for each operator of a pass that is no view, counted on the meta device. A compiled network keeps its
  matrix products and attention, and has as many fused kernels between them. Casts of autocast are not counted.
"""

from typing import NamedTuple

import torch
from torch import nn

from data.sets.form import ImageForm
from models.backbones.flops import forward_multiply_adds
from models.backbones.passes import Kernels, count_passes
from trainer.build import build_network
from trainer.config.tree import Config
from trainer.engines.fsdp import units


class Work(NamedTuple):
    """What there is to do. Heads of loss terms are not counted."""

    forward_flops: float  # of an image
    backward_flops: float  # of an image, recomputation included
    forward_kernels: float  # of a micro-batch
    backward_kernels: float  # of a micro-batch, recomputation included
    kept: float  # numbers of an image that autograd keeps if nothing is recomputed
    sizes: list[int]  # numbers of each parameter
    in_blocks: int  # numbers of all blocks
    block: int  # numbers of the largest
    tokens: float
    units: int  # that FSDP gathers

    @property
    def parameters(self) -> int:
        """Numbers in all."""
        return sum(self.sizes)


def count_work(config: Config, images: ImageForm) -> Work:
    """Count the work of a config's network on these images."""
    with torch.device("meta"):
        network = build_network(config, images)
    channels, side, _ = images.shape
    size, share = config.groups.size, config.groups.share or 0.0
    flops = {n: 2 * forward_multiply_adds(network, n, channels, side, n) / n for n in {1, size}}
    forward = (1 - share) * flops[1] + share * flops[size]
    again = recomputed_blocks(config) / config.model.depth
    passes = count_passes(network, channels, side)
    kernels = _launched(config, passes.forward)
    blocks = list(network.blocks)
    return Work(
        forward,
        (2 + again) * forward,
        kernels,
        _launched(config, passes.backward) + again * kernels,
        passes.kept,
        [parameter.numel() for parameter in network.parameters()],
        sum(map(_numbers, blocks)),
        max(map(_numbers, blocks)),
        network.tokens,
        len(units(blocks)),
    )


def recomputed_blocks(config: Config) -> int:
    """Return the number of blocks that activation checkpointing recomputes."""
    every = config.activation_checkpointing
    return -(-config.model.depth // every) if every else 0


def micro_batches(config: Config, ranks: int) -> int:
    """Return the number of micro-batches of a rank's step: parts with and without groups are cut by themselves."""
    own = config.train.global_batch // ranks
    grouped = round(own * (config.groups.share or 0)) if config.groups.mixing == "within_step" else 0
    return sum(-(-part // (config.train.micro_batch or own)) for part in (grouped, own - grouped))


def _launched(config: Config, kernels: Kernels) -> int:
    return 2 * kernels.products if config.compile else kernels.all


def _numbers(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
