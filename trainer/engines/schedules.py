"""The learning rate over a run: a warm-up, then a schedule. All of it is a function of the images seen.

To add a schedule, write a function `schedule(optim, position, images) -> share` and give it a line in SCHEDULES: the
share of the way from `optim.final_lr` to `optim.lr` at which the learning rate is when `position` images of a run of
`images` have been seen, from the end of the warm-up on.
"""

import math
from collections.abc import Callable

from trainer.engines.config import OptimConfig

Schedule = Callable[[OptimConfig, int, int], float]


def constant(optim: OptimConfig, position: int, images: int) -> float:
    """Stay at `lr`."""
    return 1.0


def cosine(optim: OptimConfig, position: int, images: int) -> float:
    """Fall along half a cosine (Loshchilov and Hutter 2017, "SGDR", equation 5, without restarts)."""
    return (1 + math.cos(math.pi * (1 - linear(optim, position, images)))) / 2


def linear(optim: OptimConfig, position: int, images: int) -> float:
    """Fall evenly from the end of the warm-up on."""
    fall = optim.decay_images or images - optim.warmup
    return _left(position - optim.warmup, fall)


def wsd(optim: OptimConfig, position: int, images: int) -> float:
    """Stay at `lr`, then fall evenly until the end of the run (Hu et al. 2024, "MiniCPM", section 4, with a straight
    line for the decay)."""
    fall = optim.decay_images or (images - optim.warmup) / 10
    return _left(position - (images - fall), fall)


def _left(passed: float, fall: float) -> float:
    return min(max(1 - passed / fall, 0.0), 1.0)


SCHEDULES: dict[str, Schedule] = {"constant": constant, "cosine": cosine, "linear": linear, "wsd": wsd}


def lr_at(optim: OptimConfig, position: int, images: int) -> float:
    """Return the learning rate of the step that brings the images seen to `position`, in a run of `images`."""
    if position < optim.warmup:
        return optim.lr * (position / optim.warmup)
    return optim.final_lr + (optim.lr - optim.final_lr) * SCHEDULES[optim.schedule](optim, position, images)


def check_schedule(optim: OptimConfig, images: int) -> None:
    """Raise ValueError unless the schedule exists, has what it is given, and fits in a run of `images`."""
    if optim.schedule not in SCHEDULES:
        known = " or ".join(map(repr, SCHEDULES))
        raise ValueError(f"optim.schedule={optim.schedule}: input should be {known}")
    if optim.schedule == "constant":  # a run may end within the warm-up
        for name in ("decay_images", "final_lr"):
            if value := getattr(optim, name):
                raise ValueError(f"optim.{name}={value}: schedule=constant does not fall; set optim.schedule=cosine")
        return
    if optim.final_lr > optim.lr:
        raise ValueError(f"optim.final_lr={optim.final_lr}: above optim.lr={optim.lr}; lower it")
    if optim.warmup + (optim.decay_images or 1) > images:
        name = "decay_images" if optim.decay_images else "warmup"
        raise ValueError(
            f"optim.{name}={getattr(optim, name)}: optim.warmup={optim.warmup} and a fall by"
            f" schedule={optim.schedule} are longer than train.images={images}; lower it, or raise train.images"
        )
