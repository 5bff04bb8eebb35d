"""Whether another engine, or fewer nodes, would do better."""

from collections.abc import Iterator
from typing import NamedTuple

from trainer.config.tree import Config, check_world
from trainer.errors import RunError
from trainer.estimate.hardware import Cluster, Utilisation
from trainer.estimate.memory import on_device
from trainer.estimate.step import Estimate, estimate
from trainer.estimate.work import Work

CLEAR = 1.1  # a gain that the estimate can tell
CHEAPER = 2.0  # a saving of GPU-hours that is worth a slower step


class Option(NamedTuple):
    """Another way to run, and seconds of its step: the geometric mean of best and worst."""

    engine: str
    nodes: int
    seconds: float


def advice(config: Config, work: Work, cluster: Cluster, utilisation: Utilisation) -> list[str]:
    """Return a line for each piece of advice: a faster way to run, and one that needs far fewer GPU-hours."""
    needed = estimate(config, work, cluster, utilisation)
    now = Option(config.engine, cluster.nodes, _typical(needed))
    options = list(_options(config, work, cluster, utilisation))
    lines, chosen = [], now
    if needed.best.bound_by != "compute":
        of_rank = config.train.global_batch // cluster.ranks
        lines.append(f"{of_rank} images on a rank take less time to compute than {needed.best.bound_by}")
    if on_device(config, needed.memory) > cluster.gpu.memory:
        lines.append(
            "does not fit into a GPU: set activation_checkpointing=1, a smaller train.micro_batch or engine=fsdp"
        )
    fastest = min(options, key=lambda option: option.seconds, default=now)
    if now.seconds > CLEAR * fastest.seconds:
        chosen = fastest
        lines.append(f"faster: {_named(fastest, now)}, {now.seconds / fastest.seconds:.1f} times as fast")
    fewest = min(options, key=lambda option: option.nodes * option.seconds, default=now)
    saving = chosen.nodes * chosen.seconds / (fewest.nodes * fewest.seconds)
    if fewest.nodes < chosen.nodes and saving > CHEAPER:
        slower = fewest.seconds / chosen.seconds
        lines.append(
            f"cheaper: {_named(fewest, now)}, {slower:.1f} times as long but {1 / saving:.0%} of the GPU-hours"
        )
    return lines


def _options(config: Config, work: Work, cluster: Cluster, utilisation: Utilisation) -> Iterator[Option]:
    """Yield ddp, hsdp and fsdp on as many nodes or fewer, where batches can be dealt and memory suffices."""
    nodes = cluster.nodes
    while nodes:
        smaller = cluster._replace(nodes=nodes)
        for engine in ("ddp", "hsdp", "fsdp"):
            other = config.model_copy(update={"engine": engine, "shard_size": None})
            try:
                check_world(other, smaller.ranks)
            except RunError:
                continue
            needed = estimate(other, work, smaller, utilisation)
            if on_device(other, needed.memory) <= cluster.gpu.memory:
                yield Option(engine, nodes, _typical(needed))
        nodes //= 2


def _typical(needed: Estimate) -> float:
    return (needed.best.whole * needed.worst.whole) ** 0.5


def _named(option: Option, now: Option) -> str:
    """Return what to set."""
    changes = [f"engine={option.engine}"] if option.engine != now.engine else []
    changes += [f"--nodes {option.nodes}"] if option.nodes != now.nodes else []
    return " ".join(changes)
