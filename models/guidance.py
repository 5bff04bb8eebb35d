"""Classifier-free guidance whose two predictions see groups of different size: C and UC of Group Diffusion."""

from collections.abc import Callable

import torch
from torch import Tensor

from models.embeddings import NULL_LABEL
from models.paths import Path
from models.samplers import Velocity


def guided_velocity(
    network: Callable[..., Tensor],
    path: Path,
    label: Tensor,
    slot: Tensor,
    weight: float,
    cond_group_size: int,
    uncond_group_size: int,
    interval: tuple[float, float] | None = None,
) -> Velocity:
    """The velocity that a sampler integrates: u + weight * (c - u), the convention of the public code.

    c is the prediction for `label` (B,) at group size C, u the one without label at group size UC, of the same noisy
    images; weight 1 is c alone (and u is not computed), the paper's scale is weight - 1. Outside the closed `interval`
    of log-SNR there is no guidance (Kynkaanniemi et al., arXiv 2404.07724). B is a multiple of both group sizes.
    """
    for name, size in (("cond_group_size", cond_group_size), ("uncond_group_size", uncond_group_size)):
        if len(label) % size:
            raise ValueError(f"{name}={size}: must divide the number of images sampled together, {len(label)}")
    null = torch.full_like(label, NULL_LABEL)

    def velocity(x: Tensor, t: float) -> Tensor:
        time = torch.full((len(x),), t, dtype=torch.float32, device=x.device)
        prediction = network(x, time, label, slot, cond_group_size).to(x.dtype)  # a bf16 network, fp32 arithmetic
        log_snr = float(path.log_snr(torch.tensor([t], dtype=torch.float64)))  # on the CPU: no GPU wait
        if weight != 1 and (interval is None or interval[0] <= log_snr <= interval[1]):
            unconditional = network(x, time, null, slot, uncond_group_size).to(x.dtype)
            prediction = unconditional + weight * (prediction - unconditional)
        return path.velocity(prediction, x, time)

    return velocity
