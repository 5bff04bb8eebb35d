"""How long a step takes.

- Compute: FLOPs of a rank over peak x utilisation.
- Launches: kernels x 5 us of the process that launches them, while the GPU computes; a call of torch.distributed
  counts as three (copy in, exchange, copy out).
- Update: bytes of the states that clipping (12 a gradient), AdamW (28 a weight) and averages (12 each) read and write,
  over the memory's bandwidth. What `offload` copies and computes on the host is not counted.
- At best everything overlaps: passes take the longer of compute and launches, exchanges that fit are hidden. At worst
  nothing does, and the sum counts. The true step lies between the two.
"""

from typing import NamedTuple

from trainer.config.tree import Config
from trainer.estimate.communication import exchanges, exposed_seconds, total_calls, total_moved, total_seconds
from trainer.estimate.hardware import Cluster, Utilisation
from trainer.estimate.memory import Memory, averages, memory, shards
from trainer.estimate.work import Work, micro_batches

LAUNCH = 5e-6  # seconds
LAUNCHES_OF_A_CALL = 3


class Step(NamedTuple):
    """Seconds of a step: of its parts, of the exchanges that nothing hides, and as a whole."""

    compute: float
    communication: float
    exposed: float
    launches: float
    update: float
    whole: float

    @property
    def bound_by(self) -> str:
        """The part that takes longest."""
        parts = {name: getattr(self, name) for name in ("compute", "communication", "launches", "update")}
        return max(parts, key=lambda name: parts[name])


class Estimate(NamedTuple):
    """A run on a cluster: bytes that a rank holds, and sends in a step; the step at best and at worst."""

    memory: Memory
    sent: float
    best: Step
    worst: Step


def estimate(config: Config, work: Work, cluster: Cluster, utilisation: Utilisation) -> Estimate:
    """Return the estimate of a run: at best with the high utilisation, at worst with the low one."""
    found, parts = exchanges(config, work, cluster), micro_batches(config, cluster.ranks)
    of_rank = config.train.global_batch / cluster.ranks
    communication = total_seconds(found, parts, cluster.link)
    calls = LAUNCHES_OF_A_CALL * total_calls(found, parts)
    launch_forward, launch_backward = parts * LAUNCH * work.forward_kernels, parts * LAUNCH * work.backward_kernels
    launches = launch_forward + launch_backward + LAUNCH * calls
    update = _update_bytes(config, cluster) * work.parameters / cluster.gpu.bandwidth

    def step(share: float, overlapped: bool) -> Step:
        rate = getattr(cluster.gpu, config.precision) * share
        forward, backward = of_rank * work.forward_flops / rate, of_rank * work.backward_flops / rate
        compute = forward + backward
        if not overlapped:
            whole = compute + communication + launches + update
            return Step(compute, communication, communication, launches, update, whole)
        forward, backward = max(forward, launch_forward), max(backward, launch_backward)
        exposed = exposed_seconds(found, parts, cluster.link, forward, backward)
        whole = max(forward + backward + exposed, launches) + update
        return Step(compute, communication, exposed, launches, update, whole)

    best, worst = step(utilisation.high, True), step(utilisation.low, False)
    return Estimate(memory(config, work, cluster), total_moved(found, parts), best, worst)


def _update_bytes(config: Config, cluster: Cluster) -> float:
    """Return the bytes that a rank's update moves per parameter of the network."""
    shared = shards(config, cluster)
    return 0 if config.offload else 12 / shared.gradients + 28 / shared.moments + 12 * averages(config) / shared.weights
