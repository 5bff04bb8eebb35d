"""ODE samplers. They integrate dx/dt = velocity(x, t) from t = 0 to 1 and know nothing of groups or classes."""

from collections.abc import Callable

from torch import Tensor

Velocity = Callable[[Tensor, float], Tensor]


def euler(velocity: Velocity, noise: Tensor, steps: int) -> Tensor:
    """Euler's method, order 1: one evaluation a step."""
    x = noise
    for i in range(steps):
        x = x + velocity(x, i / steps) / steps
    return x


def heun(velocity: Velocity, noise: Tensor, steps: int) -> Tensor:
    """Heun's method, order 2 (Karras et al., arXiv 2206.00364, alg. 1 without noise): two evaluations a step."""
    x = noise
    for i in range(steps):
        slope = velocity(x, i / steps)
        ahead = velocity(x + slope / steps, (i + 1) / steps)
        x = x + (slope + ahead) / (2 * steps)
    return x


SAMPLERS: dict[str, Callable[[Velocity, Tensor, int], Tensor]] = {"euler": euler, "heun": heun}
