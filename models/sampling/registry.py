"""The samplers, and which of them fit a path.

To add one, write a function (problem, state) -> state and add a line to SAMPLERS.
"""

from models.paths.base import NoisePath
from models.sampling.ode import ddim, dopri5, euler, heun, pseudo_corrector
from models.sampling.samplers import Sampler, even_times
from models.sampling.stochastic import ddpm, sde, sde_times

VELOCITY = frozenset({"velocity"})
SAMPLERS = {
    "euler": Sampler(euler, VELOCITY, even_times),
    "heun": Sampler(heun, VELOCITY, even_times),
    "pseudo_corrector": Sampler(pseudo_corrector, VELOCITY, even_times),
    "dopri5": Sampler(dopri5, frozenset({"velocity", "data"}), even_times, adaptive=True),
    "sde": Sampler(sde, frozenset({"velocity", "score"}), sde_times),
    "ddim": Sampler(ddim, frozenset({"data", "noise"}), even_times),
    "ddpm": Sampler(ddpm, frozenset({"posterior"}), even_times),
}


def fitting_samplers(path: NoisePath) -> list[str]:
    """Return the names of the samplers whose needs the path offers."""
    return [name for name, sampler in SAMPLERS.items() if sampler.needs <= path.offers]
