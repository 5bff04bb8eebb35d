"""The velocity field of whole groups, with guidance, to differentiate or to integrate with your own methods."""

from collections.abc import Callable

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.paths.base import NoisePath
from models.sampling.guidance import Guidance, Networks, guided
from models.sampling.samplers import same_time


def velocity_field(
    networks: Networks, path: NoisePath, guidance: Guidance, label: Tensor, slot: Tensor
) -> Callable[[Tensor, float], Tensor]:
    """Return field(x, t): dx/dt (B, C, H, W) of images x at time t, with label (B,) and slot (B,); B is whole groups.

    It is differentiable in x by vjp and jvp, any number of times: attention is computed with plain matrix products,
    because fused kernels have no forward derivative. Raise ValueError if the path has no velocity.
    """
    if "velocity" not in path.offers:
        raise ValueError(f"path={path.name}: has no velocity; give one of continuous times")
    denoise = guided(networks, path, guidance, label, lambda prediction: slot)

    def field(x: Tensor, t: float) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return path.velocity(denoise(x, t), x, same_time(t, x))

    return field
