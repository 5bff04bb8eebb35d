"""The estimate of a run, before it is submitted, as a readable table: memory, communication, time, advice."""

from collections.abc import Callable

from data.sets.form import ImageForm
from trainer.config.tree import Config
from trainer.estimate.advice import advice
from trainer.estimate.hardware import Cluster, Utilisation
from trainer.estimate.memory import on_device
from trainer.estimate.step import Estimate, Step, estimate
from trainer.estimate.work import count_work

DAY = 86400


def estimate_table(config: Config, images: ImageForm, cluster: Cluster, utilisation: Utilisation) -> str:
    """Return the estimate of a run on a cluster. Times have two columns, at best and at worst (step.py)."""
    work = count_work(config, images)
    needed = estimate(config, work, cluster, utilisation)
    held, batch = needed.memory, config.train.global_batch
    flops = batch * (work.forward_flops + work.backward_flops)
    peak, link = getattr(cluster.gpu, config.precision), cluster.link
    place = ", in the host's memory" if config.offload else ""
    rows = [
        ("parameters", f"{work.parameters / 1e6:,.1f} M"),
        ("FLOPs of a step", f"{flops / 1e12:,.1f} T"),
        (f"images of a step, of each of {cluster.ranks} ranks", f"{batch:,}", f"{batch // cluster.ranks:,}"),
        (f"memory of a rank, engine={config.engine}", _gib(on_device(config, held))),
        (f"  parameters, gradients, optimizer, EMA{place}", _gib(held.states)),
        ("  blocks gathered at once", _gib(held.gathered)),
        ("  activations", _gib(held.activations)),
        ("sent by a rank in a step", _gib(needed.sent)),
        ("", "at best", "at worst"),
        _both(
            f"compute at {utilisation.high:.0%}, {utilisation.low:.0%} of {peak / 1e12:.0f} TFLOP/s",
            needed,
            lambda step: _ms(step.compute),
        ),
        _both(
            f"communication at {link.inside / 1e9:g} GB/s in a node, {link.between / 1e9:g} between",
            needed,
            lambda step: _ms(step.communication),
        ),
        _both("  of that, not hidden by compute", needed, lambda step: _ms(step.exposed)),
        _both("launches of kernels, 5 us each", needed, lambda step: _ms(step.launches)),
        _both("update of weights and averages", needed, lambda step: _ms(step.update)),
        _both("a step", needed, lambda step: _ms(step.whole)),
        _both("bound by", needed, lambda step: step.bound_by),
        _both("images/s", needed, lambda step: f"{batch / step.whole:,.0f}"),
        _both(
            f"days to {config.train.images:,} images",
            needed,
            lambda step: f"{config.train.images / batch * step.whole / DAY:,.2f}",
        ),
    ]
    width = max(len(row[0]) for row in rows)
    table = [f"{row[0]:{width}}" + "".join(f"  {value:>13}" for value in row[1:]) for row in rows]
    return "\n".join(line.rstrip() for line in [*table, *advice(config, work, cluster, utilisation)])


def _both(name: str, needed: Estimate, of: Callable[[Step], str]) -> tuple[str, str, str]:
    return name, of(needed.best), of(needed.worst)


def _gib(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.1f} ms"
