"""What a run is estimated for: GPUs, how many, and what connects them."""

import re
from typing import NamedTuple

from trainer.errors import RunError


class GPU(NamedTuple):
    """A GPU by its data sheet: dense FLOP/s by precision (fp32 without TF32), bytes/s and bytes of memory."""

    bf16: float
    fp32: float
    bandwidth: float
    memory: float


GPUS = {
    "h100": GPU(989e12, 67e12, 3.35e12, 80e9),
    "h800": GPU(989e12, 67e12, 3.35e12, 80e9),
    "h200": GPU(989e12, 67e12, 4.8e12, 141e9),
    "a100": GPU(312e12, 19.5e12, 2.039e12, 80e9),
}


class Interconnect(NamedTuple):
    """Bytes/s that a GPU sends to one of its node, and, by its own share of the node's network, to another node."""

    inside: float
    between: float


class Cluster(NamedTuple):
    """Equal nodes, a rank on each GPU."""

    nodes: int
    per_node: int
    gpu: GPU
    link: Interconnect

    @property
    def ranks(self) -> int:
        """The world size."""
        return self.nodes * self.per_node


class Utilisation(NamedTuple):
    """Shares of the peak arithmetic that passes through the network may reach."""

    low: float
    high: float


def read_interconnect(text: str) -> Interconnect:
    """Return the interconnect of a text like 400GB/s+50GB/s. Raise RunError if it is not of that form."""
    if re.search(r"\dGb/s", text):
        raise RunError(f"--interconnect {text}: Gb/s are bits; write bytes, as 50GB/s for 400Gb/s")
    found = re.fullmatch(r"(\d+(?:\.\d+)?)GB/s\+(\d+(?:\.\d+)?)GB/s", text)
    rates = [1e9 * float(number) for number in found.groups()] if found else []
    if not rates or min(rates) <= 0:
        raise RunError(
            f"--interconnect {text}: should be what a GPU sends inside a node and, by its share of the network, between"
            " nodes; write as 400GB/s+50GB/s"
        )
    return Interconnect(*rates)


def read_utilisation(text: str) -> Utilisation:
    """Return the range of a text like 0.2-0.35 or 0.3. Raise RunError if it is not of that form."""
    found = re.fullmatch(r"(\d*\.?\d+)(?:-(\d*\.?\d+))?", text)
    low, high = (float(found[1]), float(found[2] or found[1])) if found else (0.0, 0.0)
    if not 0 < low <= high <= 1:
        raise RunError(f"--utilisation {text}: should be shares of the peak, lowest first; write as 0.2-0.35 or 0.3")
    return Utilisation(low, high)
