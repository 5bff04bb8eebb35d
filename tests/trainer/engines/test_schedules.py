import math
import random
from itertools import pairwise

import pytest
import torch

from trainer.checkpoints.weights import find_checkpoint
from trainer.config.tree import load_config
from trainer.engines.config import OptimConfig
from trainer.engines.schedules import lr_at
from trainer.errors import RunError
from trainer.loop import train

RANDOM = random.Random(0)
FALLING = ("cosine", "linear", "wsd")


def optim(**fields):
    return OptimConfig.model_validate({"lr": 3e-4, **fields})


@pytest.mark.parametrize("warmup", [0, 7, 320])
def test_constant_is_what_it_was(warmup):
    """To the last bit: the expression of older versions, which knew no schedules."""
    for _ in range(100):
        lr, position = RANDOM.uniform(1e-6, 1e-2), RANDOM.randrange(1, 1000)
        expected = lr * min(1.0, position / warmup) if warmup else lr
        assert lr_at(optim(lr=lr, warmup=warmup), position, 640) == expected


@pytest.mark.parametrize("decay_images", [None, 700])
@pytest.mark.parametrize("final_lr", [0.0, 2e-5])
@pytest.mark.parametrize("warmup", [0, 200])
@pytest.mark.parametrize("schedule", FALLING)
def test_a_fall_has_its_closed_form(schedule, warmup, final_lr, decay_images):
    """At random positions, at its ends and in its middle, which is the mean of both learning rates."""
    images, chosen = 1000, optim(schedule=schedule, warmup=warmup, final_lr=final_lr, decay_images=decay_images)
    length = decay_images or {"wsd": (images - warmup) / 10}.get(schedule, images - warmup)
    start = images - length if schedule == "wsd" else warmup

    def expected(position):
        done = min(max((position - start) / length, 0), 1)
        left = math.cos(math.pi * done / 2) ** 2 if schedule == "cosine" else 1 - done
        return (1 - left) * final_lr + left * chosen.lr

    positions = [RANDOM.randrange(warmup, images + 1) for _ in range(50)]
    for position in (*positions, start, start + length / 2, start + length):
        assert lr_at(chosen, position, images) == pytest.approx(expected(position), rel=1e-12, abs=1e-18), position
    assert lr_at(chosen, start, images) == chosen.lr
    assert lr_at(chosen, start + length / 2, images) == pytest.approx((chosen.lr + final_lr) / 2, rel=1e-9)
    assert lr_at(chosen, start + length, images) == final_lr == lr_at(chosen, 10 * images, images)


@pytest.mark.parametrize("schedule", FALLING)
def test_it_rises_over_the_warm_up_and_never_afterwards(schedule):
    """Without a jump: no step of one image changes it by more than the steepest slope there is."""
    images, warmup = 1000, 300
    chosen = optim(schedule=schedule, warmup=warmup, final_lr=1e-5)
    rates = [lr_at(chosen, position, images) for position in range(images + 1)]
    assert rates[0] == 0 and rates[warmup] == chosen.lr and rates[images] == chosen.final_lr
    assert rates[: warmup + 1] == [pytest.approx(chosen.lr * i / warmup) for i in range(warmup + 1)]
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    steepest = {"cosine": math.pi / 2 / 700, "linear": 1 / 700, "wsd": 1 / 70}[schedule]
    jumps = [abs(after - before) for before, after in pairwise(rates)]
    assert max(jumps) <= max(steepest, 1 / warmup) * chosen.lr * (1 + 1e-9)


def test_what_a_longer_run_changes():
    """Nothing while the rate is `lr` (wsd), or where the length of the fall is given (cosine, linear)."""
    for schedule, given, same in (
        ("wsd", 300, range(700)),
        ("cosine", 800, range(1000)),
        ("linear", 800, range(1000)),
    ):
        chosen = optim(schedule=schedule, warmup=100, decay_images=given)
        assert all(lr_at(chosen, position, 1000) == lr_at(chosen, position, 2000) for position in same)
    for schedule in FALLING:
        chosen = optim(schedule=schedule, warmup=100)
        assert lr_at(chosen, 950, 1000) < lr_at(chosen, 950, 2000)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ("optim.schedule=step", r"^optim.schedule=step: input should be 'constant' or 'cosine' or 'linear' or 'wsd'"),
        (
            "optim.schedule=cosine optim.decay_images=321",
            r"^optim.decay_images=321: optim.warmup=320 and .* train.images=640",
        ),
        ("optim.schedule=linear optim.warmup=0 optim.decay_images=641", r"^optim.decay_images=641: .* longer than"),
        ("optim.schedule=wsd optim.decay_images=321", r"^optim.decay_images=321: .* are longer than train.images=640"),
        ("optim.schedule=wsd optim.warmup=640", r"^optim.warmup=640: .* are longer than train.images=640"),
        ("optim.schedule=linear train.images=320", r"^optim.warmup=320: .* train.images=320; lower it, or raise"),
        ("optim.schedule=linear optim.final_lr=1", r"^optim.final_lr=1.0: above optim.lr=0.001; lower it"),
        ("optim.final_lr=1e-5", r"^optim.final_lr=1e-05: schedule=constant does not fall; set optim.schedule"),
        ("optim.decay_images=100", r"^optim.decay_images=100: schedule=constant does not fall"),
        ("optim.schedule=cosine optim.decay_images=0", r"^optim.decay_images=0: .* greater than or equal to 1"),
        ("optim.schedule=cosine optim.final_lr=-1", r"^optim.final_lr=-1: .* greater than or equal to 0"),
    ],
)
def test_what_cannot_be_is_one_line(overrides, line):
    with pytest.raises(RunError, match=line) as caught:
        load_config("tests/trainer/tiny.yaml", overrides.split())
    assert "\n" not in str(caught.value)


def test_what_just_fits_is_accepted():
    for schedule in FALLING:
        load_config("tests/trainer/tiny.yaml", [f"optim.schedule={schedule}", "optim.decay_images=320"])
        load_config("tests/trainer/tiny.yaml", [f"optim.schedule={schedule}", "optim.warmup=639"])
    load_config("tests/trainer/tiny.yaml", ["train.images=32"])  # a run may end within the warm-up


def test_a_run_follows_its_schedule_also_when_it_resumes(metrics, tensors, tmp_path):
    """The rates that it reports are those at the ends of its steps; stopped and continued it is the same run."""
    options = ["engine=single", "optim.schedule=cosine", "optim.warmup=64", "optim.final_lr=1e-4", "train.images=320"]
    whole, stopped = (load_config("tests/trainer/tiny.yaml", [*options, f"run={tmp_path}/{n}"]) for n in "ab")
    train(whole)
    steps = iter(range(100))
    assert train(stopped, stop_requested=lambda: next(steps) == 4) == "stopped"
    assert train(stopped) == "finished"
    rates = [row["lr"] for row in metrics(tmp_path / "a")]
    assert rates == [lr_at(whole.optim, 32 * (step + 1), 320) for step in range(10)]
    assert len(set(rates[1:])) == 9 and rates[-1] == 1e-4
    assert metrics(tmp_path / "b") == metrics(tmp_path / "a")
    found, expected = (tensors(find_checkpoint(tmp_path / name)) for name in "ba")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
