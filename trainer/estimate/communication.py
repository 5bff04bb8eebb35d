"""What the ranks exchange in a step, and how long that takes.

- Bytes: by rings, a gather or a reduction of S bytes over P ranks moves (P - 1) / P S of each rank, an all-reduce twice
  that (Thakur et al. 2005, "Optimization of Collective Communication Operations in MPICH", sections 4.1 and 4.5). DDP
  all-reduces gradients in buckets. FSDP gathers blocks for forward and backward, in bf16 if `precision` says so, and
  the rest once in fp32, and reduces gradients in fp32; HSDP does so in a copy and all-reduces the shards of gradients
  between copies. ZeRO-1 and 2 reduce gradients and gather updated weights, ZeRO-3 does as FSDP, all in fp32
  (Rajbhandari et al. 2020, "ZeRO", section 7). Gathers come with each micro-batch, gradients with the last one (ZeRO-2
  and 3: with each).
- Rate: rings leave a node by the network adapters of all its ranks, so a ring of G ranks a node runs at the slower of
  the rate inside and G times a GPU's rate between nodes.
- Latency: NCCL's own figures (src/graph/tuning.cc, NVLink and network): 8.4 us, and 3.4 us for each step of a ring
  inside a node, 9.6 us between nodes; all-reduces may use trees instead: 4.4 us, twice 1.2 us a rank of a node and
  8.5 us for each doubling of the nodes.
- Overlap: gathers hide behind the pass that they are for, gradients behind the backward pass of their micro-batch, as
  far as they fit. DeepSpeed hides nothing at stages 0 to 2 unless `overlap_comm` is set.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Literal, NamedTuple

from trainer.config.tree import Config
from trainer.engines.build import ENGINES
from trainer.engines.deepspeed_config import BUCKET, GROUP
from trainer.engines.fsdp import FSDP
from trainer.estimate.hardware import Cluster, Interconnect
from trainer.estimate.memory import shards
from trainer.estimate.work import Work

FP32, BF16 = 4, 2  # bytes
FIRST_BUCKET, DDP_BUCKET = 2**20, 25 * 2**20  # bytes: DistributedDataParallel's defaults


class Group(NamedTuple):
    """Ranks that exchange, and the nodes on which they are."""

    ranks: int
    nodes: int


class Exchange(NamedTuple):
    """Exchanges of a step, or of each micro-batch: bytes in all, before they are shared out, and number of calls."""

    group: Group
    bytes: float
    calls: int
    hidden_by: Literal["forward", "backward", "nothing"]
    all_reduce: bool = False
    in_each: bool = False

    def moved(self) -> float:
        """Return the bytes that a rank sends."""
        ranks = self.group.ranks
        return (1 + self.all_reduce) * (ranks - 1) / ranks * self.bytes

    def seconds(self, link: Interconnect) -> float:
        """Return how long they take, one after another."""
        ranks, nodes = self.group
        here = ranks / nodes
        rate = link.inside if nodes == 1 else min(link.inside if here > 1 else math.inf, here * link.between)
        latency = 8.4 + (1 + self.all_reduce) * (3.4 * (ranks - nodes) + 9.6 * (nodes - 1))
        if self.all_reduce:
            latency = min(latency, 4.4 + 2 * (1.2 * (here - 1) + 8.5 * math.log2(nodes)))
        return self.moved() / rate + self.calls * latency * 1e-6


def exchanges(config: Config, work: Work, cluster: Cluster) -> list[Exchange]:
    """Return what the ranks exchange in a step: nothing in a group of one."""
    return [exchange for exchange in _all_exchanges(config, work, cluster) if exchange.group.ranks > 1]


def _all_exchanges(config: Config, work: Work, cluster: Cluster) -> list[Exchange]:
    weights, _, moments = shards(config, cluster)
    ranks, whole = cluster.ranks, FP32 * work.parameters
    everyone = Group(ranks, cluster.nodes)
    if weights == 1 and moments == 1:
        if config.engine == "deepspeed":
            return [Exchange(everyone, whole, _calls(work, BUCKET), "nothing", all_reduce=True)]
        return [Exchange(everyone, whole, ddp_buckets(work.sizes), "backward", all_reduce=True)]
    if weights == 1:
        reduced, per_micro = _overlapped(config, False), config.zero == 2
        return [
            Exchange(everyone, whole, _calls(work, BUCKET), reduced, in_each=per_micro),
            Exchange(everyone, whole, _calls(work, GROUP), "nothing"),
        ]
    one_copy = Group(weights, -(-weights // cluster.per_node))
    if not issubclass(ENGINES[config.engine], FSDP):
        reduced, leaves = _overlapped(config, True), len(work.sizes)
        gathered = "forward" if reduced == "backward" else "nothing"
        return [
            Exchange(one_copy, whole, leaves, gathered, in_each=True),
            Exchange(one_copy, whole, leaves, reduced, in_each=True),
            Exchange(one_copy, whole, _calls(work, BUCKET), reduced, in_each=True),
        ]
    number = BF16 if config.precision == "bf16" else FP32
    copies, in_node = ranks // weights, max(1, cluster.per_node // weights)
    between = Group(copies, -(-copies // in_node))
    return [
        Exchange(one_copy, number * work.in_blocks, work.units, "forward", in_each=True),
        Exchange(one_copy, FP32 * (work.parameters - work.in_blocks), 1, "forward", in_each=True),
        Exchange(one_copy, number * work.in_blocks, work.units, "backward", in_each=True),
        Exchange(one_copy, whole, work.units + 1, "backward"),
        Exchange(between, whole / weights, work.units + 1, "backward", all_reduce=True),
    ]


def total_moved(found: Iterable[Exchange], micro_batches: int) -> float:
    """Return the bytes that a rank sends in a step."""
    return sum(exchange.moved() * _times(exchange, micro_batches) for exchange in found)


def total_seconds(found: Iterable[Exchange], micro_batches: int, link: Interconnect) -> float:
    """Return the time of all exchanges of a step, hidden or not."""
    return sum(exchange.seconds(link) * _times(exchange, micro_batches) for exchange in found)


def total_calls(found: Iterable[Exchange], micro_batches: int) -> int:
    """Return the calls of a step."""
    return sum(exchange.calls * _times(exchange, micro_batches) for exchange in found)


def exposed_seconds(
    found: Iterable[Exchange], micro_batches: int, link: Interconnect, forward: float, backward: float
) -> float:
    """Return the time of a step's exchanges that its forward and backward passes (seconds, over all micro-batches)
    cannot hide. Groups of ranks exchange side by side: HSDP's copies are connected by other links than their parts."""

    def excess(hidden_by: str, room: float, last: bool) -> float:
        taken: dict[Group, float] = defaultdict(float)
        for e in found:
            if e.hidden_by == hidden_by and (last or e.in_each):
                taken[e.group] += e.seconds(link)
        return max(0.0, max(taken.values(), default=0.0) - room / micro_batches)

    found = list(found)
    exposed = total_seconds([e for e in found if e.hidden_by == "nothing"], micro_batches, link)
    for hidden_by, room in {"forward": forward, "backward": backward}.items():
        exposed += (micro_batches - 1) * excess(hidden_by, room, False) + excess(hidden_by, room, True)
    return exposed


def ddp_buckets(sizes: list[int]) -> int:
    """Return the number of buckets in which DDP all-reduces gradients of fp32: from the last parameter on, a bucket is
    full when it has reached its limit."""
    count, held, limit = 0, 0, FIRST_BUCKET
    for size in reversed(sizes):
        held += FP32 * size
        if held >= limit:
            count, held, limit = count + 1, 0, DDP_BUCKET
    return count + (held > 0)


def _times(exchange: Exchange, micro_batches: int) -> int:
    return micro_batches if exchange.in_each else 1


def _calls(work: Work, numbers: int) -> int:
    return math.ceil(work.parameters / numbers)


def _overlapped(config: Config, default: bool) -> Literal["backward", "nothing"]:
    """Return what hides DeepSpeed's reduction of gradients."""
    asked = config.deepspeed.get("zero_optimization", {}).get("overlap_comm", default)
    return "backward" if asked else "nothing"
