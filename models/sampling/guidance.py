"""Guidance, which combines two predictions that see groups of different sizes (C and UC of Group Diffusion) or come
from different networks; and where groups share attention."""

import math
from collections.abc import Callable
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from models.backbones.embeddings import NULL_LABEL
from models.paths.base import NoisePath
from models.sampling.samplers import Denoise

Network = Callable[..., Tensor]
Slots = Callable[[int], Tensor]  # of prediction 0, c, or 1, u: which row of the sample embedding each image has, (B,)
Level = Annotated[float, Field(ge=-math.inf)]  # not NaN
Interval = tuple[Level | None, Level | None]  # of log-SNR, closed; null: no end


def inside(log_snr: float, interval: Interval | None) -> bool:
    """Return whether a noise level is in an interval; None is everywhere."""
    low, high = interval or (None, None)
    return (low is None or low <= log_snr) and (high is None or log_snr <= high)


class Networks(NamedTuple):
    """The networks that sample: the main one, one whose prediction replaces the unconditional one in guidance, and one
    that takes the noisiest steps."""

    network: Network
    weaker: Network | None = None
    small: Network | None = None


class Guidance(NamedTuple):
    """How two predictions, for groups of C and of UC images, are combined, and where in log-SNR."""

    weight: float | Tensor  # one number, or (B,)
    cond_group_size: int = 1  # C
    uncond_group_size: int = 1  # UC
    interval: Interval | None = None  # in which guidance acts; None: everywhere
    window: Interval | None = None  # in which groups share attention; None: everywhere
    channels: int | None = None  # how many, from the first, are guided; None: all


def guided(networks: Networks, path: NoisePath, guidance: Guidance, label: Tensor, slots: Slots) -> Denoise:
    """Return the function that a sampler calls: u + weight * (c - u), the convention of the public code; the paper's
    scale is weight - 1.

    c is the prediction for `label` (B,) at group size C, and u the prediction without label at group size UC, for the
    same noisy images; with a `weaker` network, u is its prediction for the label at group size C instead (autoguidance:
    Karras et al., arXiv 2406.02507). If the weight is the number 1, and outside the `interval` of log-SNR (Kynkaanniemi
    et al., arXiv 2404.07724), u is not computed. Only the first `channels` of an image are guided (3 in SiT's public
    code), never the variance. Outside the log-SNR `window`, groups have one image. Raise ValueError unless B is a
    multiple of both group sizes.
    """
    network, weaker, _ = networks
    weight, cond_group_size, uncond_group_size, interval, window, channels = guidance
    for name, size in (("cond_group_size", cond_group_size), ("uncond_group_size", uncond_group_size)):
        if len(label) % size:
            raise ValueError(f"{name}={size}: must divide the number of images sampled together, {len(label)}")
    null = torch.full_like(label, NULL_LABEL)
    unguided = not isinstance(weight, Tensor) and weight == 1  # never for a tensor: all batches make the same calls
    factor = weight.view(-1, 1, 1, 1) if isinstance(weight, Tensor) else weight

    def denoise(x: Tensor, t: float) -> Tensor:
        time = torch.full((len(x),), t, dtype=torch.float32, device=x.device)
        log_snr = log_snr_at(path, t)
        c, uc = (cond_group_size, uncond_group_size) if inside(log_snr, window) else (1, 1)
        prediction = network(x, time, label, slots(0), c).to(x.dtype)  # the network may be bf16, the arithmetic is fp32
        if unguided or not inside(log_snr, interval):
            return prediction
        other = weaker(x, time, label, slots(1), c) if weaker else network(x, time, null, slots(1), uc)
        first = min(channels or x.shape[1], x.shape[1])  # the variance follows
        other = other[:, :first].to(x.dtype)
        mixed = other + factor * (prediction[:, :first] - other)
        return torch.cat([mixed, prediction[:, first:]], dim=1)

    return denoise


def stitched(small: Denoise, large: Denoise, path: NoisePath, switch: float) -> Denoise:
    """Return T-Stitch's prediction (Pan et al., arXiv 2402.14167): the small network's where the log-SNR is below
    `switch`, the noisiest part, and the large one's after it."""
    return lambda x, t: (small if log_snr_at(path, t) < switch else large)(x, t)


def log_snr_at(path: NoisePath, t: float) -> float:
    """Return the log-SNR of one time, computed on the CPU to avoid waiting for a GPU."""
    return float(path.log_snr(torch.tensor([t], dtype=torch.float64)))
