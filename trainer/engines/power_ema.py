"""Post-hoc EMA: averages of any length, made after training from snapshots of two tracked ones.

Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models", arXiv 2312.02696, section 3 and
appendix C. A *profile* (std, step) is the weight of the network after each step tau = 1..step in the average taken at
`step`: proportional to tau^gamma, where gamma follows from `std`, the standard deviation of the profile in units of
`step`. Averages are linear in their profiles, so those that add up to a profile add up to its average.
"""

import warnings
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.errors import RunError

WIDEST = 12**-0.5  # the std of the plain mean of all networks, gamma = 0; a wider profile prefers the older ones
# distances in units of a profile's length: the largest that still counts as an approximation, and as an exact one
MISFIT, EXACT = 0.5, 0.05
CHUNK = 1 << 16  # steps in memory at once, for each std


def exponent(std: float) -> float:
    """Return gamma for a relative standard deviation: std = (gamma+1)^(1/2) (gamma+2)^-1 (gamma+3)^-1/2 (eq. 123).

    Raise RunError unless 0 < std < 1/sqrt(12), which means gamma > 0. For 0.05 and 0.10, gamma is 16.97 and 6.94.
    """
    if not 0 < std < WIDEST:
        raise RunError(f"std={std}: must be over 0 and under 1/sqrt(12) = 0.28867")
    # squared, it is a cubic; in terms of w = std (gamma + 2), its roots stay near 1, -1 and std, however small std is
    return float(np.roots([1, std, -1, std]).real.max() / std - 2)


def power_decay(std: float) -> Callable[[int], float]:
    """Return the decay at each step for an average with the profile (std, last step): (1 - 1/step)^(gamma+1) (eq. 127).

    Steps are counted from 1; the first one forgets the initial weights.
    """
    power = exponent(std) + 1
    return lambda step: (1 - 1 / step) ** power


def coordinates(profiles: list[tuple[float, int]]) -> np.ndarray:
    """Return a column for each profile (std, step >= 1), (rows, len(profiles)) float64, such that the columns have the
    same inner products as the profiles.

    The decays telescope: the networks up to tau have (tau/step)^(gamma+1) of the whole weight, so tau itself has
    (tau/step)^(gamma+1) - ((tau-1)/step)^(gamma+1). Hence, between two neighbouring steps of `profiles`, profiles of
    one std are multiples of each other, and a QR decomposition with a column for each std keeps all that matters of
    these tau. Time grows with steps * stds^2; no matrix of profiles * steps is made; and least squares on these columns
    loses no digits to squaring, as it would on the matrix of inner products (eq. 151).
    """
    stds, column = np.unique([std for std, _ in profiles], return_inverse=True)
    powers = np.array([exponent(std) + 1 for std in stds])
    steps = np.array([step for _, step in profiles])
    rows = []
    for first, last in pairwise([0, *np.unique(steps)]):
        basis: Any = np.empty((0, len(powers)))  # the types of numpy.linalg.qr lack mode="r"
        for start in range(first, last, CHUNK):
            tau = np.arange(start, min(start + CHUNK, last) + 1)
            piece = np.diff((tau[:, None] / last) ** powers, axis=0)  # for profiles that end at `last`
            basis = np.linalg.qr(np.vstack([basis, piece]), mode="r")
        shrunk = np.minimum(last / steps, 1) ** powers[column]  # what remains of it after later steps
        rows.append(basis[:, column] * np.where(last <= steps, shrunk, 0))
    return np.concatenate(rows)


def coefficients(snapshots: list[tuple[float, int]], std: float, step: int) -> np.ndarray:
    """Return factors of snapshots (std, step of each) whose weighted sum is nearest to the profile (std, step) in least
    squares, divided by their sum: (len(snapshots),), float64.

    Divided as in the authors' code: factors that add up to less than 1, as they do if the snapshots are few, would
    shrink all weights. Warn if the result is farther from the profile than EXACT, with the std that it has instead.

    This is Algorithm 3 with the profiles that averages really have, sums over steps; the paper's integrals are their
    limit for many steps. So a tracked profile is returned as it is, up to rounding. The result is most accurate at the
    step of a snapshot. Elsewhere the next snapshot is used too: earlier ones lack the networks since the last. Later
    ones have the factor 0. Raise RunError if std is out of range, if step is before the first or after the last
    snapshot, or if the result is farther from the profile than MISFIT.
    """
    ends = np.array([end for _, end in snapshots if end > 0])  # at step 0 nothing was averaged yet
    if not (ends.size and ends.min() <= step <= ends.max()):
        held = f"choose one from {ends.min()} to {ends.max()}" if ends.size else "there are none"
        raise RunError(f"step={step}: not among the steps of the snapshots; {held}")
    following = ends[ends >= step].min()
    used = [i for i, (_, end) in enumerate(snapshots) if 0 < end <= following]
    profiles = coordinates([*(snapshots[i] for i in used), (std, step)])
    lengths = np.linalg.norm(profiles, axis=0)  # late, narrow profiles are much longer than early ones
    scaled = profiles / lengths
    factors = np.linalg.lstsq(scaled[:, :-1], scaled[:, -1], rcond=None)[0] / lengths[:-1]
    factors /= factors.sum()
    misfit = np.linalg.norm(profiles[:, :-1] @ factors - profiles[:, -1]) / lengths[-1]
    result = np.zeros(len(snapshots))
    result[used] = factors
    if not misfit <= EXACT:
        found = f"std={std}: at step {step} the snapshots miss it by {misfit:.0%}"
        advice = "choose the step of a snapshot, a std nearer to theirs, or save them more often"
        if not misfit <= MISFIT:
            raise RunError(f"{found}; {advice}")
        warnings.warn(f"{found}: this average has std={width(snapshots, result) / step:.3g}; {advice}", stacklevel=2)
    return result


def width(snapshots: list[tuple[float, int]], factors: np.ndarray) -> float:
    """Return the standard deviation, in steps, of the sum of the snapshots' profiles times factors that add up to 1.

    From the moments of each profile, E tau = step (gamma+1) / (gamma+2) and E tau^2 = step^2 (gamma+1) / (gamma+3), the
    paper's integrals; 0 if the sum, which may be negative at some steps, has no spread.
    """
    gamma = np.array([exponent(std) for std, _ in snapshots])
    step = np.array([end for _, end in snapshots], dtype=np.float64)
    mean, square = (factors @ (step**power * (gamma + 1) / (gamma + 1 + power)) for power in (1, 2))
    return float(np.sqrt(max(square - mean**2, 0)))


@torch.no_grad()
def combine(parts: Iterable[dict[str, Tensor]], coefficients: Iterable[float]) -> dict[str, Tensor]:
    """Return the sum of parts (name -> tensor, equal names), each times its coefficient: float32, summed in float64.

    If `parts` is an iterator, one of them is in memory at a time. A part with coefficient 0 is ignored, even if it has
    NaNs. Raise ValueError unless there are as many parts as coefficients.
    """
    left, total = [float(factor) for factor in coefficients], {}
    for part in parts:
        if not left:
            raise ValueError("more parts than coefficients")
        factor = left.pop(0)
        total = total or {name: torch.zeros_like(weight, dtype=torch.float64) for name, weight in part.items()}
        for name in total if factor else ():
            total[name].add_(part[name], alpha=factor)
        del part  # before the next is made
    if left:
        raise ValueError(f"{len(left)} coefficients have no part")
    return {name: weight.float() for name, weight in total.items()}
