"""What is computed in fp32 where the rest of a network computes in bf16.

The law is torch.autocast's over fp32 weights: layers and attention are bf16, and so is what a block makes of them
before it is added to the tokens. Tokens are fp32, because the positions that are added to them first are (so also in
the public codes of REPA and Group Diffusion, where the law is the same). A backbone itself says what else is fp32: the
embedding of time, and its sum with those of class and slot; norms; RoPE; the last layer.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def in_fp32(device: torch.device) -> AbstractContextManager:
    """Turn autocast off. Do nothing on a device that has none, like `meta`."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def at_least_fp32(x: Tensor) -> Tensor:
    """Return x in fp32, or unchanged if it is in fp64, as in a network whose steps are compared in fp64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
