"""Checkpoints that are written beside the training: right, bounded, and never in silence not written."""

import json
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.staging import DefaultStager
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from data.sets.form import ImageForm
from tests.patience import PATIENCE
from tests.trainer.forked import newest_is_good, one_line, positions, train_hasty, train_tiny
from trainer.checkpoints import folder as checkpoint
from trainer.checkpoints.config import CheckpointConfig
from trainer.checkpoints.folder import CHECKPOINTS
from trainer.checkpoints.saver import Saver
from trainer.ranks import process_group

FORM = ImageForm((1, 8, 8), 10, None, "images")

RANDOM = random.SystemRandom()
LAST = "checkpoints/000000000640"
MB = 1 << 20


# written while the state changes


def random_state(seed):
    """Large enough to be still written when `save` returns, and whatever else a state may hold."""
    generator = torch.Generator().manual_seed(seed)
    large = torch.randn(4, 3 * MB, generator=generator)
    shared = torch.randn(100, generator=generator)
    return {
        "model": {"large": large, "scalar": torch.randn((), generator=generator), "empty": torch.empty(0, 3)},
        "ema": {"turned": torch.randn(50, 20, generator=generator).T, "half": large[0, :1000].bfloat16()},
        "optimizer": {"state": {"a": {"first": shared[:50], "second": shared[50:]}}},
    }


def leaves(state, prefix=""):
    for name, value in state.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_state_that_changes_as_soon_as_it_is_copied_is_written_as_it_was(device, alone, tensors, tmp_path):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    live = random_state(0)
    live = {part: _to(values, device) for part, values in live.items()}
    with Saver(tmp_path, CheckpointConfig(keep=100), timeout=60) as saver:
        for number in range(1, 5):
            for (_, tensor), (_, new) in zip(leaves(live), leaves(random_state(number)), strict=True):
                tensor.copy_(new)
            saver.save(number, {CHECKPOINTS: live}, "", FORM, {})
            saver.wait_for_copy()
            for _, tensor in leaves(live):
                tensor.fill_(float("nan"))
            assert positions(tmp_path / CHECKPOINTS) == list(range(1, number)), "those before are there, this is not"
    for number in range(1, 5):
        checkpoint.verify(tmp_path / f"checkpoints/{number:012d}")
        found = tensors(tmp_path / f"checkpoints/{number:012d}")
        expected = dict(leaves(random_state(number)))
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name].float(), found[name]) for name in expected), number


def _to(values, device):
    return {name: _to(v, device) if isinstance(v, dict) else v.to(device) for name, v in values.items()}


def save_sharded(folder, rounds):
    with process_group() as ranks:
        mesh = init_device_mesh("cpu", (ranks.world_size,))
        live = {"model": {"even": torch.zeros(4, 2 * MB), "uneven": torch.zeros(3, 7), "one": torch.zeros(1, 5)}}
        live["model"] = {name: distribute_tensor(value, mesh, [Shard(0)]) for name, value in live["model"].items()}
        live["optimizer"] = {"state": {"w": {"step": torch.zeros(())}}}
        with Saver(folder, CheckpointConfig(keep=100), timeout=60) as saver:
            for number in range(1, rounds + 1):
                for _, tensor in leaves(live):
                    fill(tensor, number)
                saver.save(number, {CHECKPOINTS: live}, "", FORM, {})
                saver.wait_for_copy()
                for _, tensor in leaves(live):
                    fill(tensor, float("nan"))
                dist.barrier()


def fill(tensor, value):
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    local.copy_(value + torch.arange(local.numel()).reshape(local.shape))


def test_shards_that_change_as_soon_as_they_are_copied_are_written_as_they_were(ranks, tensors, tmp_path):
    ranks.run(2, save_sharded, tmp_path / "run", 3)
    for number in range(1, 4):
        found = tensors(tmp_path / f"run/checkpoints/{number:012d}")
        halves = torch.stack([number + torch.arange(4 * MB)] * 2).reshape(4, 2 * MB)
        assert torch.equal(found["model.even"], halves.float())
        assert torch.equal(found["model.uneven"].reshape(-1)[:14], number + torch.arange(14.0))
        assert torch.equal(found["model.uneven"].reshape(-1)[14:], number + torch.arange(7.0))
        assert torch.equal(found["model.one"].reshape(-1), number + torch.arange(5.0))
        assert found["optimizer.state.w.step"] == number


def memory(name):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) << 10


def measure(folder, asynchronous, size):
    """Memory above that before the first save, in sizes of the state: at most in the first save, at most in five that
    overlap, after them, and after the end."""
    with process_group():
        state = {"model": {f"{i}": torch.randn(size // 16) for i in range(4)}}
        before, found = memory("VmRSS"), []
        with Saver(folder, CheckpointConfig(keep=1, asynchronous=asynchronous), timeout=60) as saver:
            for rounds in (1, 5):
                Path("/proc/self/clear_refs").write_text("5")  # forget the peak
                for number in range(rounds):
                    saver.save(10 * rounds + number, {CHECKPOINTS: state}, "", FORM, {})
                saver.wait()
                found.append(memory("VmHWM"))
            found.append(memory("VmRSS"))
        found.append(memory("VmRSS"))
        (folder / "memory.json").write_text(json.dumps([(one - before) / size for one in found]))


@pytest.mark.parametrize("asynchronous", [True, False])
def test_there_is_one_copy_of_the_state_however_many_saves_and_none_at_the_end(asynchronous, ranks, tmp_path):
    ranks.run(1, measure, tmp_path, asynchronous, 256 * MB)
    first, five, after, ended = json.loads((tmp_path / "memory.json").read_text())
    copies = 1 if asynchronous else 0
    slack = 70 / 256  # of what checkpoints take besides, as buffers of 48 MB
    assert first < copies + slack
    assert five < first + slack
    assert after < copies + slack
    assert ended < slack


def test_written_beside_the_training_or_not_the_checkpoints_are_the_same(
    ranks, undisturbed, metrics, tensors, tmp_path
):
    for engine in ("fsdp", "ddp"):
        run = tmp_path / engine
        command = [f"run={run}", f"engine={engine}", "checkpoint.every=32"]
        ranks.run(2, train_tiny, *command, "checkpoint.asynchronous=false")
        beside = undisturbed(f"engine={engine}", "checkpoint.every=32")
        assert positions(run / CHECKPOINTS) == positions(beside / CHECKPOINTS) == list(range(32, 641, 32))
        assert metrics(run) == metrics(beside)
        for path in RANDOM.sample(checkpoint.find(run / CHECKPOINTS)[0], 5):
            expected, found = tensors(path), tensors(beside / CHECKPOINTS / path.name)
            assert expected.keys() == found.keys()
            assert all(torch.equal(expected[name], found[name]) for name in expected), path


def train_with_slow_copies(*overrides):
    stage = DefaultStager._stage

    def slowly(self, *arguments, **keywords):
        time.sleep(0.3)  # the gradients of a tiny network are there long before
        return stage(self, *arguments, **keywords)

    DefaultStager._stage = slowly
    train_tiny(*overrides)


def test_weights_are_updated_when_they_have_been_copied(ranks, undisturbed, tensors, tmp_path):
    ranks.run(2, train_with_slow_copies, f"run={tmp_path}/run", "engine=fsdp", "checkpoint.every=128")
    expected = undisturbed("engine=fsdp", "checkpoint.every=32")
    for position in range(128, 641, 128):
        name = f"{CHECKPOINTS}/{position:012d}"
        found = tensors(tmp_path / "run" / name)
        assert all(torch.equal(found[key], tensor) for key, tensor in tensors(expected / name).items()), position


# what cannot be written


def save_on_ever_smaller_disks(folder, sizes):
    """Of `sizes` bytes; a checkpoint that fits is there before each. What happened: [size, error or None]."""
    seen = []
    with process_group() as ranks:
        mesh = init_device_mesh("cpu", (ranks.world_size,))
        for number, size in enumerate(sizes, start=2):
            _resize(ranks, folder, 100 * MB)
            if ranks.rank == 0:
                shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
            dist.barrier()
            state = {"model": {"a": distribute_tensor(torch.full((2, 20_000), float(number)), mesh, [Shard(0)])}}
            checkpoint.save(folder / CHECKPOINTS, 1, state, "seed: 0\n" * 1000, FORM)
            used = sum(file.stat().st_blocks * 512 for file in folder.rglob("*"))
            _resize(ranks, folder, used + size)
            asynchronous = bool(number % 2)
            error = None
            try:
                with Saver(folder, CheckpointConfig(keep=9, asynchronous=asynchronous), timeout=60) as saver:
                    saver.save(number, {CHECKPOINTS: state}, "seed: 0\n" * 1000, FORM, {})
            except checkpoint.RunError as failed:
                error = str(failed)
            dist.barrier()
            seen.append((size, error, sorted(path.name for path in (folder / CHECKPOINTS).iterdir())))
            for path in (folder / CHECKPOINTS).iterdir():
                checkpoint.verify(path)
                assert checkpoint.load(path, state) == int(path.name)
                assert (state["model"]["a"].to_local() == number).all()
            dist.barrier()
        (folder.parent / f"seen-{ranks.rank}.json").write_text(json.dumps(seen))


def _resize(ranks, folder, size):
    if ranks.rank == 0:
        subprocess.run(["mount", "-o", f"remount,size={size}", folder], check=True)
    dist.barrier()


def test_wherever_in_a_save_the_disk_is_full_all_ranks_say_so_and_the_last_checkpoint_stays(
    ranks, small_disk, tmp_path
):
    folder = tmp_path / "disk"
    small_disk(folder, 100 * MB)
    page = 4096
    sizes = [RANDOM.randrange(1, 60) * page for _ in range(24)] + [page, 2 * page, 100 * page]
    ranks.run(2, save_on_ever_smaller_disks, folder, sizes)
    seen = [json.loads((tmp_path / f"seen-{rank}.json").read_text()) for rank in range(2)]
    fits = set()
    for number, (one, other) in enumerate(zip(*seen, strict=True), start=2):
        size, error, left = one
        name = f"{number:012d}"
        if error is None:
            assert other[1] is None and left == ["000000000001", name]
        else:
            for said in (error, other[1]):
                assert said.startswith(f"{folder}/checkpoints/{name}: cannot be written: "), size
                assert "MB free" in said and "\n" not in said
            assert left == ["000000000001"], (size, left)
        fits.add((size, error is None))
    assert {ok for _, ok in fits} == {True, False}
    assert max(size for size, ok in fits if not ok) < min(size for size, ok in fits if ok) + 3 * page


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_on_a_full_disk_a_run_ends_with_an_error_and_goes_on_when_there_is_room(
    asynchronous, ranks, small_disk, undisturbed, same, tmp_path
):
    whole, run = undisturbed("engine=fsdp"), tmp_path / "run"
    size = sum(file.stat().st_blocks * 512 for file in (whole / LAST).rglob("*"))
    fit = RANDOM.randint(1, 3)
    small_disk(run / CHECKPOINTS, int((fit + RANDOM.uniform(0.05, 0.9)) * size))
    command = [f"run={run}", "engine=fsdp", f"checkpoint.asynchronous={asynchronous}"]
    line = ranks.fail(2, train_tiny, *command)
    assert f"{run}/checkpoints/{160 * (fit + 1):012d}: cannot be written: " in line and "MB free" in line
    assert [path.name for path in sorted((run / CHECKPOINTS).iterdir())] == [
        f"{160 * n + 160:012d}" for n in range(fit)
    ]
    assert newest_is_good(run / CHECKPOINTS)
    small_disk(run / CHECKPOINTS, 6 * size)
    assert f"continuing from {run}/checkpoints/{160 * fit:012d}" in ranks.run(2, train_tiny, *command)
    same(run, whole)


def test_a_save_that_fails_beside_the_training_ends_the_run_long_before_the_next_save(ranks, metrics, tmp_path):
    """The folder goes while it is written to."""
    run, away = tmp_path / "run", tmp_path / "away"
    ranks.run(2, train_tiny, f"run={run}", "engine=ddp", "train.images=3168", "checkpoint.every=3200")
    command = [f"run={run}", "engine=ddp", "train.images=320000", "checkpoint.every=3200"]  # the first: after one step
    processes = ranks.start(2, train_tiny, *command)
    while True:
        assert wait_for(lambda: incomplete(run), processes)
        ranks.signal(processes, signal.SIGSTOP)
        time.sleep(0.05)  # till they have
        if caught := incomplete(run):
            break
        ranks.signal(processes, signal.SIGCONT)
    (run / CHECKPOINTS).rename(away)
    (run / CHECKPOINTS).write_text("in its place")
    ranks.signal(processes, signal.SIGCONT)
    line = one_line(ranks.finish(processes))
    assert f"{caught[0].with_suffix('')}: cannot be written: " in line
    assert metrics(run)[-1]["position"] < int(caught[0].stem) + 3200
    (run / CHECKPOINTS).unlink()
    away.rename(run / CHECKPOINTS)
    assert newest_is_good(run / CHECKPOINTS)


def incomplete(run):
    return list(run.glob("checkpoints/*.incomplete"))


def wait_for(condition, processes):
    """Whether it came to be before one of the processes ended."""
    end = time.monotonic() + PATIENCE
    while not condition():
        if any(process.exitcode is not None for process in processes):
            return False
        assert time.monotonic() < end
        time.sleep(0.001)
    return True


def test_a_rank_killed_again_and_again_while_checkpoints_are_written_the_run_ends_bit_identical(
    ranks, undisturbed, same, tmp_path
):
    long = ("engine=fsdp", "train.images=1600", "checkpoint.every=32")
    whole, run = undisturbed(*long), tmp_path / "run"
    kills, caught = [], 0
    while len(kills) < 10:
        command = [f"run={run}", *long]
        processes = ranks.start(2, train_hasty, *command)
        wait_for(lambda: not incomplete(run), processes)  # what the kill before left
        if not wait_for(lambda: incomplete(run), processes):
            assert len(kills) >= 5, "too few steps for so many kills"
            break
        delay, victim = RANDOM.choice([0, 0.005, RANDOM.uniform(0, 0.2)]), RANDOM.randrange(2)
        time.sleep(delay)
        processes[victim].kill()
        kills.append((victim, delay))
        survivor = processes[1 - victim]
        begun = time.monotonic()
        ranks.finish([survivor])
        assert time.monotonic() - begun < 30
        caught += bool(incomplete(run))
        newest_is_good(run / CHECKPOINTS)
        if survivor.exitcode == 0:
            break  # it was done
    assert caught, "no kill came while a checkpoint was written"
    ranks.run(2, train_tiny, f"run={run}", *long)
    assert not incomplete(run)
    same(run, whole, kills, "checkpoints/000000001600")
