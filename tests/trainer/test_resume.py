"""Killed for real, continued by the same command."""

import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from data.batches.batch import make_batch
from data.batches.loader import GroupSampler
from data.batches.plan import make_planner
from data.sets.registry import DataConfig, open_images
from tests.patience import PATIENCE
from tests.trainer.forked import train_tiny
from trainer.config.tree import load_config
from trainer.loop import train

LAST = "checkpoints/000000000640"


def wait_for(condition, processes):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end and all(p.exitcode is None for p in processes), "the run ended before the kill"
        time.sleep(0.001)


def rows(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


@pytest.fixture
def uninterrupted(ranks, tmp_path):
    def run(world: int, *overrides: str) -> Path:
        folder = tmp_path / f"uninterrupted-{world}"
        ranks.run(world, train_tiny, f"run={folder}", *overrides)
        return folder

    return run


@pytest.mark.parametrize("engine", ["fsdp", "ddp"])
def test_killed_at_random_steps_a_run_ends_bit_identical(engine, ranks, metrics, tensors, uninterrupted, tmp_path):
    whole = uninterrupted(2, f"engine={engine}")
    run, overrides = tmp_path / "killed", [f"run={tmp_path / 'killed'}", f"engine={engine}", "checkpoint.every=96"]
    steps = sorted(random.SystemRandom().sample(range(1, 19), 2))
    for step in steps:
        processes = ranks.start(2, train_tiny, *overrides)
        wait_for(lambda step=step: rows(run) >= step, processes)
        ranks.signal(processes, signal.SIGKILL)
        ranks.finish(processes)
    ranks.run(2, train_tiny, *overrides)
    assert metrics(run) == metrics(whole), steps
    expected, found = tensors(whole / LAST), tensors(run / LAST)
    assert expected.keys() == found.keys()
    assert {name.split(".")[0] for name in found} == {"model", "ema", "optimizer"}
    for name in expected:
        assert torch.equal(expected[name], found[name]), (name, steps)


def test_killed_while_a_checkpoint_is_written_a_run_goes_on_from_the_last_complete_one(
    ranks, metrics, uninterrupted, tmp_path
):
    """The ranks are frozen as soon as an unfinished folder shows; if it was renamed meanwhile, at the next one."""
    whole = uninterrupted(2)
    run = tmp_path / "killed"
    overrides = [f"run={run}", "checkpoint.every=32"]
    processes = ranks.start(2, train_tiny, *overrides)
    for _ in range(19):
        wait_for(lambda: list(run.glob("checkpoints/*.incomplete")), processes)
        ranks.signal(processes, signal.SIGSTOP)
        time.sleep(0.05)
        if incomplete := list(run.glob("checkpoints/*.incomplete")):
            break
        ranks.signal(processes, signal.SIGCONT)
    assert incomplete, "no checkpoint was caught while it was written"
    ranks.signal(processes, signal.SIGKILL)
    ranks.finish(processes)
    complete = sorted(path.name for path in run.glob("checkpoints/*") if path not in incomplete)
    said = ranks.run(2, train_tiny, *overrides)
    assert f"{incomplete[0].name}: incomplete" in said
    assert (f"continuing from {run}/checkpoints/{complete[-1]}" in said) if complete else ("continuing" not in said)
    assert metrics(run) == metrics(whole)


def test_continued_on_other_ranks_and_engines_the_losses_go_on(ranks, metrics, tensors, uninterrupted, tmp_path):
    whole = uninterrupted(2)
    expected = [row["loss"] for row in metrics(whole)]
    for world, engine in ((1, "single"), (1, "fsdp"), (4, "fsdp"), (4, "ddp")):
        run = tmp_path / f"{engine}-{world}"
        shutil.copytree(whole, run)
        for late in ("480", "640"):
            shutil.rmtree(run / f"checkpoints/000000000{late}")
        said = ranks.run(world, train_tiny, f"run={run}", f"engine={engine}", f"data.workers={world // 2}")
        assert f"continuing from {run}/checkpoints/000000000320" in said
        assert [row["loss"] for row in metrics(run)] == pytest.approx(expected, abs=1e-4, rel=0)
        a, b = tensors(whole / LAST), tensors(run / LAST)
        assert max((a[name] - b[name]).abs().max() for name in a if name.startswith(("model", "ema"))) < 1e-3


def test_any_world_size_sees_the_same_images_noise_and_timesteps(tiny):
    config = load_config(tiny)
    images = open_images(DataConfig())
    batch = config.train.global_batch
    planner = make_planner(config.groups, images, batch, config.seed)

    def stream(world: int, micro_batch: int | None) -> dict[int, tuple]:
        seen = {}
        for rank in range(world):
            sampler = GroupSampler(planner, len(images) // batch, 11, 50, rank, world, micro_batch)
            for micro in (micro for step in sampler for micro in step):
                made = make_batch(images, config.groups, 8, config.seed, micro)
                for i in range(len(made.u)):
                    values = (made.x, made.noise, made.u, made.label, made.slot, made.conditional)
                    seen[micro.position + i] = [value[i] for value in values]
        return seen

    expected = stream(1, None)
    assert sorted(expected) == list(range(11 * batch, 50 * batch))
    for world, micro_batch in ((2, None), (4, 2), (4, None)):
        found = stream(world, micro_batch)
        assert found.keys() == expected.keys()
        assert all(torch.equal(a, b) for key in found for a, b in zip(found[key], expected[key], strict=True))


def test_a_second_job_on_a_live_run_is_refused_and_does_no_harm(ranks, metrics, uninterrupted, tmp_path):
    long = "train.images=1920"  # enough steps to be caught in
    whole = uninterrupted(2, long)
    run = tmp_path / "run"
    processes = ranks.start(2, train_tiny, f"run={run}", long)
    wait_for(lambda: rows(run) >= 1, processes)
    ranks.signal(processes, signal.SIGSTOP)
    assert f"run={run}: another job is writing this run" in ranks.fail(2, train_tiny, f"run={run}", long)
    ranks.signal(processes, signal.SIGCONT)
    assert [code for code, _ in ranks.finish(processes)] == [0, 0]
    assert metrics(run) == metrics(whole)


def test_told_to_stop_a_run_saves_and_continues_where_it_was(tmp_path, tiny, metrics):
    config = load_config(tiny, ["engine=single", f"run={tmp_path / 'run'}"])
    answers = iter([False, False, True])
    assert train(config, stop_requested=lambda: next(answers)) == "stopped"
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["000000000096"]
    assert train(config) == "finished"
    whole = load_config(tiny, ["engine=single", f"run={tmp_path / 'whole'}"])
    assert train(whole) == "finished"
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert train(config) == "finished", "nothing is left to do, and that is no error"
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_rank_that_no_longer_answers_is_named_within_the_timeout(frozen, ranks, tmp_path):
    """Also rank 0, which keeps the store by which the ranks ask for each other."""
    run = tmp_path / "run"
    processes = ranks.start(2, train_tiny, f"run={run}", "train.timeout=12", "train.images=64000")
    wait_for(lambda: rows(run) >= 3, processes)
    ranks.signal([processes[frozen]], signal.SIGSTOP)
    begun = time.monotonic()
    [(code, errors)] = ranks.finish([processes[1 - frozen]])
    assert time.monotonic() - begun < 60
    assert code and f"no answer from ranks {frozen}" in errors
