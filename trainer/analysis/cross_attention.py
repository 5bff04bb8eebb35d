"""How images of a group attend to one another, by layer and noise level, in a training step or a sampler."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data.batches.batch import Batch
from models.backbones.attention_mass import attention_mass, cross_share, observing, s_cross
from models.objectives.denoising import denoising_loss
from models.paths.base import NoisePath
from models.sampling.guidance import Network
from trainer.engines.base import Engine

EDGES = (-5.0, -3.0, -1.0, 1.0, 3.0, 5.0)  # log-SNRs that separate the buckets of noise levels
BUCKETS = len(EDGES) + 1


class CrossAttention(NamedTuple):
    """The paper's S_cross and the share of attention that leaves an image, each (layers, buckets): means over groups,
    NaN where none shares attention. `groups` (buckets,) counts the groups. The other two are means over all groups and
    layers."""

    s_cross: Tensor
    cross_share: Tensor
    groups: Tensor
    mean_s_cross: float
    mean_cross_share: float


def step_attention(engine: Engine, path: NoisePath, micro_batches: list[Batch], device: torch.device) -> CrossAttention:
    """Measure the groups of a training step over all ranks, with the noise they were trained with; micro-batches
    without groups are skipped. All ranks call it; it computes no gradients and changes nothing."""
    sums: list[Tensor] = []
    with torch.no_grad():
        for micro in (micro for micro in micro_batches if micro.group_size > 1):
            denoising_loss(watched(engine, path, sums, engine.network), path, micro.to(device))
    total = torch.stack(sums).sum(dim=0)
    dist.all_reduce(total)
    return mean_attention(total)


def watched(network: Network, path: NoisePath, sums: list[Tensor], module: nn.Module | None = None) -> Network:
    """Return the network, wrapped so that each call with groups adds the input of `mean_attention` to `sums`. In such a
    call all groups share attention, but those beyond the first `grouped` images, which should not, do not count.
    `module` does the computing; None: the network itself."""
    computes = network if module is None else module
    assert isinstance(computes, nn.Module)

    def forward(
        x: Tensor, t: Tensor, label: Tensor, slot: Tensor, group_size: int = 1, grouped: int | None = None
    ) -> Tensor:
        if group_size == 1:
            return network(x, t, label, slot)
        masses: list[Tensor] = []
        with observing(computes, keep_masses(masses, len(x), group_size)):
            out = network(x, t, label, slot, group_size)
        mass, log_snr = torch.stack(masses), path.log_snr(t[::group_size])
        counted = torch.arange(len(log_snr), device=x.device) < (len(x) if grouped is None else grouped) // group_size
        sums.append(_sums(mass, log_snr, counted))
        return out

    return forward


def keep_masses(masses: list[Tensor], images: int, group_size: int) -> Callable[[int, Tensor, Tensor], None]:
    """Return a callback for `observing` that adds each layer's P (groups, N, N) to `masses`; NaN if none is shared."""

    def see(layer: int, q: Tensor, k: Tensor) -> None:
        if len(q) == images:
            masses.append(torch.full((images // group_size, group_size, group_size), torch.nan, device=q.device))
        else:
            masses.append(attention_mass(q, k, group_size))

    return see


def _sums(mass: Tensor, log_snr: Tensor, counted: Tensor) -> Tensor:
    """Return (3, layers, buckets) float64, S_cross, cross shares and number of groups, given P (layers, groups, N, N)
    and, for each group, its log-SNR and whether it counts (groups,). A group falls into one bucket."""
    bucket = torch.bucketize(log_snr, torch.tensor(EDGES, dtype=log_snr.dtype, device=log_snr.device))
    chosen = torch.nn.functional.one_hot(bucket, BUCKETS).double() * counted[:, None]
    of_groups = torch.stack([s_cross(mass), cross_share(mass), torch.ones_like(mass[..., 0])]).mean(dim=-1)
    return of_groups.double() @ chosen


def mean_attention(sums: Tensor) -> CrossAttention:
    """Return the means, given the sums over batches and ranks."""
    s_cross, share, groups = sums
    shared = groups.where(s_cross.isfinite(), 0).sum()
    means = (float(part.nansum() / shared) for part in (s_cross, share))
    return CrossAttention((s_cross / groups).cpu(), (share / groups).cpu(), groups[0].long().cpu(), *means)


def as_record(attention: CrossAttention, group_size: int) -> dict:
    """Return the means as JSON values: null where groups share no attention, or there are none."""
    return {
        "s_cross": _or_null(attention.mean_s_cross),
        "cross_share": _or_null(attention.mean_cross_share),
        "uniform_cross_share": 1 - 1 / group_size,
        "log_snr": list(zip((None, *EDGES), (*EDGES, None), strict=True)),
        "groups_by_level": attention.groups.tolist(),
        "s_cross_by_layer_and_level": [list(map(_or_null, row)) for row in attention.s_cross.tolist()],
        "cross_share_by_layer_and_level": [list(map(_or_null, row)) for row in attention.cross_share.tolist()],
    }


def _or_null(value: float) -> float | None:
    return None if math.isnan(value) else value
