"""What the values of an axis gain over its first one, seed by seed.

Runs of one seed share their first weights, the order of their images and their noise, also that of their samples. What
a seed does to both of them cancels in their difference, whose error is therefore smaller than that of two means.
"""

import numpy as np


def gain(before: list[float], after: list[float]) -> dict[str, float | None]:
    """Return what distances fall by, from `before` to `after` (a value of each for every seed, in the same order), as
    {"mean", "paired", "unpaired"}: the mean, its standard error over the differences of each seed, and that of two
    means that have no seed in common. The errors of one seed are None."""
    number = len(before)
    differences = np.subtract(before, after)
    found: dict[str, float | None] = {"mean": float(differences.mean()), "paired": None, "unpaired": None}
    if number > 1:
        variance = np.var(before, ddof=1) + np.var(after, ddof=1)
        found |= {
            "paired": float(np.std(differences, ddof=1) / number**0.5),
            "unpaired": float((variance / number) ** 0.5),
        }
    return found


def shown(found: dict[str, float | None], digits: int = 2) -> str:
    """Return a gain as text: mean ± paired standard error (unpaired one)."""
    if found["paired"] is None:
        return f"{found['mean']:.{digits}f}"
    return f"{found['mean']:.{digits}f} ± {found['paired']:.{digits + 1}f} ({found['unpaired']:.{digits + 1}f})"
