"""The memory of a rank.

- Model states: AdamW in fp32 keeps 4 bytes each of parameter, gradient and two moments (Rajbhandari et al. 2020,
  "ZeRO", section 3.1), each average of the weights 4 more. What an engine shards is divided by its ranks
  (`shards`). The gathered blocks are extra. With `offload` the states are in host memory.
- Activations: 34 bytes per token, channel and block in bf16, without the attention matrix, which fused attention does
  not keep (Korthikanti et al. 2022, "Reducing Activation Recomputation", equation 2); twice that in fp32. It counts
  dropout masks, which we lack, and omits the adaptive norm's copies, which we have: the least exact line. A recomputed
  block keeps only its input (2 bytes); the rest is kept for one such block at a time.
"""

from typing import NamedTuple

from trainer.config.tree import Config
from trainer.engines.base import Shards
from trainer.engines.build import ENGINES
from trainer.estimate.hardware import Cluster
from trainer.estimate.work import Work, recomputed_blocks


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
    per_rank = config.train.micro_batch or config.train.global_batch // cluster.ranks
    return Memory(
        states * work.parameters,
        2 * work.block * number if shared.weights > 1 else 0,
        number * work.tokens * config.model.width * per_rank * _kept_of_blocks(config),
    )


def on_device(config: Config, needed: Memory) -> float:
    """Return the bytes that lie in a GPU."""
    return needed.states * (not config.offload) + needed.gathered + needed.activations


def _kept_of_blocks(config: Config) -> int:
    """Return the numbers kept per token and channel: 17 per block; if recomputed, 1 per block and 17 for one."""
    recomputed = recomputed_blocks(config)
    return 17 * (config.model.depth - recomputed) + (recomputed + 17 if recomputed else 0)
