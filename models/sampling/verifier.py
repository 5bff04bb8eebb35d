"""Verifiers, which judge generated groups for samplers that choose between candidates."""

from collections.abc import Callable

from torch import Tensor

Verifier = Callable[[Tensor, Tensor, int], Tensor]
"""verify(images (B, C, H, W), label (B,), group_size) -> (B / group_size,), higher is better. Images are as a sampler
returns them, latents or pixels in [-1, 1], in contiguous groups; a group is judged as a whole."""


def sum_of_groups(values: Tensor, group_size: int) -> Tensor:
    """Return the sum over each group of the values of its images (B,): (B / group_size,). For log-probabilities it is
    the log-probability of the group. Raise ValueError unless B is whole groups."""
    if len(values) % group_size:
        raise ValueError(f"group_size={group_size}: must divide the number of images, {len(values)}")
    return values.unflatten(0, (-1, group_size)).sum(dim=1)
