"""Whether another engine, or fewer nodes, would do better."""

from collections.abc import Iterator
from typing import NamedTuple

from trainer.config.tree import Config, check_world
from trainer.engines.build import ENGINES
from trainer.errors import RunError
from trainer.estimate.hardware import Cluster, Utilisation
from trainer.estimate.memory import on_device
from trainer.estimate.step import Estimate, estimate
from trainer.estimate.work import Work

CLEAR = 1.1  # a gain that the estimate can tell
CHEAPER = 0.6  # a share of the GPU-hours that is worth a slower step


class Option(NamedTuple):
    """Another way to run, and seconds of its step: the geometric mean of best and worst."""

    engine: str
    nodes: int
    seconds: float

    @property
    def hours(self) -> float:
        """What it costs, in a unit of its own."""
        return self.nodes * self.seconds


def advice(config: Config, work: Work, cluster: Cluster, utilisation: Utilisation) -> list[str]:
    """Return a line for each piece of advice: a faster way to run, and one that needs far fewer GPU-hours."""
    needed = estimate(config, work, cluster, utilisation)
    now = Option(config.engine, cluster.nodes, _typical(needed))
    others = list(options(config, work, cluster, utilisation))
    lines, chosen = [], now
    if needed.best.bound_by != "compute":
        of_rank = config.train.global_batch // cluster.ranks
        lines.append(f"{of_rank} images on a rank are few: the limit is {needed.best.bound_by}, not compute")
    if on_device(config, needed.memory) > cluster.gpu.memory:
        lines.append(
            "does not fit into a GPU: set activation_checkpointing=1, engine=fsdp or a smaller train.micro_batch"
        )
    fastest = min(others, key=lambda option: option.seconds, default=now)
    if now.seconds > CLEAR * fastest.seconds:
        chosen = fastest
        lines.append(f"faster: {_named(fastest, config, cluster)}, {now.seconds / fastest.seconds:.1f} times as fast")
    cheaper = [option for option in others if option.hours < CHEAPER * chosen.hours]
    if cheaper:
        best = min(cheaper, key=lambda option: option.seconds)
        longer, share = best.seconds / chosen.seconds, best.hours / chosen.hours
        lines.append(
            f"cheaper: {_named(best, config, cluster)}, {longer:.1f} times as long but {share:.0%} of the GPU-hours"
        )
    return lines


def options(config: Config, work: Work, cluster: Cluster, utilisation: Utilisation) -> Iterator[Option]:
    """Yield ddp, hsdp and fsdp on as many nodes or fewer, where batches can be dealt and memory suffices."""
    nodes = cluster.nodes
    engines = [name for name in ("ddp", "hsdp", "fsdp") if not config.offload or "offload" in ENGINES[name].options]
    while nodes:
        smaller = cluster._replace(nodes=nodes)
        for engine in engines:
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


def _named(option: Option, config: Config, cluster: Cluster) -> str:
    """Return what to set."""
    changes = [f"engine={option.engine}"] if option.engine != config.engine else []
    changes += ["shard_size=null"] if config.shard_size else []
    changes += [f"--nodes {option.nodes}"] if option.nodes != cluster.nodes else []
    return " ".join(changes)
