"""The memory of a rank.

- Model states: AdamW in fp32 keeps 4 bytes each of parameter, gradient and two moments (Rajbhandari et al. 2020,
  "ZeRO", section 3.1), each average of the weights 4 more. What an engine shards is divided by its ranks
  (`shards`). The gathered blocks are extra. With `offload` the states are in host memory.
- Activations: what autograd keeps, counted on the meta device with fused attention. In bf16 it takes 65 % of the bytes
  of fp32, because matrix products are in bf16, tokens and norms not (counted on a CPU: DiT 60 %, JiT 71 %). A
  recomputed block keeps only its input, in fp32; the rest is kept for one such block at a time. A compiled network
  keeps less.
"""

import math
from typing import NamedTuple

from trainer.config.tree import Config
from trainer.engines.base import Shards
from trainer.engines.build import ENGINES
from trainer.estimate.hardware import Cluster
from trainer.estimate.work import Work, recomputed_blocks

BF16_SHARE = 0.65


class Memory(NamedTuple):
    """Bytes of a rank: states, blocks gathered at once, and activations of its largest micro-batch."""

    states: float
    gathered: float
    activations: float


def shards(config: Config, cluster: Cluster) -> Shards:
    """Return how the ranks share the states; a copy of hsdp is one node's unless the config says otherwise."""
    engine = ENGINES[config.engine]
    if "shard_size" in engine.options and not config.shard_size:
        config = config.model_copy(update={"shard_size": cluster.per_node})
    return engine.shards(config, cluster.ranks)


def averages(config: Config) -> int:
    """Return the number of averages of the weights."""
    return len(config.optim.ema) + len(config.optim.power_ema)


def memory(config: Config, work: Work, cluster: Cluster) -> Memory:
    """Return the memory of a rank."""
    shared = shards(config, cluster)
    states = 4 * (1 + averages(config)) / shared.weights + 4 / shared.gradients + 8 / shared.moments
    number = 2 if config.precision == "bf16" else 4
    per_rank = min(config.train.micro_batch or math.inf, config.train.global_batch // cluster.ranks)
    return Memory(
        states * work.parameters,
        2 * work.block * number if shared.weights > 1 else 0,
        per_rank * _activations(config, work),
    )


def on_device(config: Config, needed: Memory) -> float:
    """Return the bytes that lie in a GPU."""
    return needed.states * (not config.offload) + needed.gathered + needed.activations


def _activations(config: Config, work: Work) -> float:
    """Return the bytes kept of an image."""
    depth, recomputed = config.model.depth, recomputed_blocks(config)
    kept = work.kept * (4 * BF16_SHARE if config.precision == "bf16" else 4)
    if not recomputed:
        return kept
    inputs = recomputed * work.tokens * config.model.width * 4
    return kept * (depth - recomputed + 1) / depth + inputs
