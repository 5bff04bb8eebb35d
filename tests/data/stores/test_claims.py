"""Processes that share parts of work by claims, and files that are there whole or not at all; processes are killed."""

import errno
import fcntl
import os
import random
import shutil
import signal
import time
from multiprocessing import get_context

import pytest

from data.errors import DataError
from data.stores.claims import Claims, wait_for_lock
from data.stores.files import WORK, appearing, appearing_path, partial_of

FORK = get_context("fork")


def names(parts):
    return [f"part-{i:03d}.tar" for i in range(parts)]


def start(function, *arguments):
    process = FORK.Process(target=function, args=arguments)
    process.start()
    return process


def work_on(folder, parts, seed, hang_at=None):
    """Make parts, until the `hang_at`-th one; complain if one is claimed that a process holds which nobody killed."""
    rng = random.Random(seed)
    claims = Claims(folder, names(parts), start=rng.randrange(parts))
    for number, part in enumerate(claims):
        holder = folder / f"holder-{part}"
        if holder.exists() and not (folder / f"killed-{holder.read_text()}").exists():
            (folder / "complaints").write_text(f"{part} is held by {holder.read_text()}, who lives")
        mine = folder / f"mine-{os.getpid()}"
        mine.write_text(str(os.getpid()))
        mine.replace(holder)
        time.sleep(rng.uniform(0, 0.003))
        with (folder / "made").open("a") as log:
            log.write(f"{part} {os.getpid()}\n")
        while number == hang_at:
            time.sleep(1)
        with appearing(folder / names(parts)[part]) as file:
            file.write(b"x" * 1000)
            time.sleep(rng.uniform(0, 0.01))
            file.write(b"y" * 1000)
        holder.unlink()
        claims.release(part)


def made(folder):
    """Part -> the processes that began to make it, in this order."""
    log = [line.split() for line in (folder / "made").read_text().splitlines()]
    parts = {int(part) for part, _ in log}
    return {part: [pid for number, pid in log if int(number) == part] for part in parts}


@pytest.mark.parametrize("seed", range(3))
def test_processes_at_once_make_every_part_once(tmp_path, seed):
    processes = [start(work_on, tmp_path, 60, 10 * seed + i) for i in range(4)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert not (tmp_path / "complaints").exists()
    done = made(tmp_path)
    assert sorted(done) == list(range(60)) and all(len(pids) == 1 for pids in done.values())
    assert len({pids[0] for pids in done.values()}) > 1, "they shared it"
    assert [path.name for path in sorted(tmp_path.glob("part-*"))] == names(60)


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_and_started_again_all_parts_are_made_and_only_those_of_the_dead_twice(tmp_path, seed):
    rng, killed = random.Random(seed), set()

    def kill(process):
        (tmp_path / f"killed-{process.pid}").touch()
        killed.add(str(process.pid))
        process.kill()

    victim = start(work_on, tmp_path, 80, seed, 2)
    while not (tmp_path / "made").exists() or (tmp_path / "made").read_text().count("\n") < 3:
        time.sleep(0.001)
    kill(victim)
    victim.join()
    for _ in range(100):
        if len(list(tmp_path.glob("part-*"))) == 80:
            break
        processes = [start(work_on, tmp_path, 80, rng.random()) for _ in range(rng.randrange(1, 6))]
        for process in processes:
            time.sleep(rng.uniform(0, 0.03))
            if rng.random() < 0.8:
                kill(process)
        for process in processes:
            process.join()
            assert process.exitcode in (0, -signal.SIGKILL)
        for part in tmp_path.glob("part-*"):
            assert part.read_bytes() == b"x" * 1000 + b"y" * 1000, "whole, or not there"
    assert not (tmp_path / "complaints").exists()
    done = made(tmp_path)
    assert sorted(done) == list(range(80))
    assert all(set(pids[:-1]) <= killed for pids in done.values()), "who is not killed loses nothing"
    assert sum(map(len, done.values())) > 80, "somebody was killed at work"
    assert [path for path in (tmp_path / WORK).iterdir() if path.suffix != ".lock"] == [], "nothing lies about"


def hold(folder, parts, ready):
    for _ in Claims(folder, parts):
        partial_of(folder / parts[0]).write_bytes(b"half of it")
        ready.set()
        time.sleep(60)


def test_a_part_is_not_given_away_until_its_holder_dies_and_then_without_what_it_left(tmp_path):
    ready, parts = FORK.Event(), names(3)
    holder = start(hold, tmp_path, parts, ready)
    assert ready.wait(10)
    claims = iter(Claims(tmp_path, parts))
    assert [next(claims), next(claims)] == [1, 2]
    half = tmp_path / WORK / f"{parts[0]}.{os.uname().nodename}-{holder.pid}"
    another = tmp_path / WORK / f"{parts[1]}.elsewhere-7"
    another.touch()
    assert half.exists()
    holder.kill()
    holder.join()
    assert next(claims) == 0, "in another round"
    assert not half.exists() and another.exists()
    assert next(claims, None) is None


@pytest.mark.parametrize("first", range(5))
def test_claims_go_round_from_the_given_start(tmp_path, first):
    assert list(Claims(tmp_path, names(5), start=first)) == [(first + i) % 5 for i in range(5)]


def test_parts_that_are_there_are_not_claimed_and_a_released_one_without_result_is_again(tmp_path):
    (tmp_path / names(4)[2]).touch()
    claims = Claims(tmp_path, names(4))
    taken = []
    for part in claims:
        taken.append(part)
        if len(taken) == 3:
            claims.release(0)
        if len(taken) > 3:
            break
    assert taken == [0, 1, 3, 0]


def test_no_part_is_claimed_once_the_whole_is_there(tmp_path):
    whole = tmp_path / "whole"
    claims = iter(Claims(tmp_path, names(4), complete=whole))
    assert next(claims) == 0
    whole.touch()
    assert list(claims) == []


def test_where_there_are_no_locks_it_is_said_and_every_part_is_made(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    (tmp_path / WORK).mkdir()
    another = tmp_path / WORK / f"{names(4)[1]}.elsewhere-7"
    another.touch()
    with pytest.warns(UserWarning, match="no file locks"):
        assert list(Claims(tmp_path, names(4))) == [0, 1, 2, 3]
    assert another.exists(), "its writer may live"
    with pytest.warns(UserWarning, match="no file locks"), wait_for_lock(tmp_path, "it"):
        pass


def count(folder, times):
    for _ in range(times):
        with wait_for_lock(folder, "counter"):
            number = int((folder / "counter").read_text())
            time.sleep(0.0005)
            (folder / "counter").write_text(str(number + 1))


def test_one_process_at_a_time_has_a_lock_that_is_waited_for(tmp_path):
    (tmp_path / "counter").write_text("0")
    processes = [start(count, tmp_path, 50) for _ in range(4)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert (tmp_path / "counter").read_text() == "200"


def tidy_up(folder, ready):
    while True:
        shutil.rmtree(folder / WORK, ignore_errors=True)
        ready.set()


def test_locks_and_claims_can_be_had_while_another_process_that_is_done_tidies_up(tmp_path):
    ready = FORK.Event()
    tidier = start(tidy_up, tmp_path, ready)
    try:
        assert ready.wait(10)
        for i in range(3000):
            with wait_for_lock(tmp_path, "it"):
                pass
            assert list(Claims(tmp_path, [f"{i}.tar"])) == [0]
    finally:
        tidier.kill()
        tidier.join()


def write_forever(path, ready):
    for i in range(1 << 30):
        with appearing(path) as file:
            for _ in range(20):
                file.write(bytes([i % 256]) * 50_000)
        ready.set()


@pytest.mark.parametrize("seed", range(5))
def test_a_file_is_whole_whenever_its_writer_is_killed(tmp_path, seed):
    ready = FORK.Event()
    writer = start(write_forever, tmp_path / "file", ready)
    assert ready.wait(10)
    time.sleep(random.Random(seed).uniform(0, 0.05))
    writer.kill()
    writer.join()
    content = (tmp_path / "file").read_bytes()
    assert len(content) == 1_000_000 and len(set(content)) == 1


@pytest.mark.parametrize("before", [None, b"old"])
def test_a_file_whose_writer_fails_stays_as_it_was(tmp_path, before):
    if before:
        (tmp_path / "file").write_bytes(before)
    with pytest.raises(KeyboardInterrupt), appearing(tmp_path / "file") as file:
        file.write(b"new")
        raise KeyboardInterrupt
    assert ((tmp_path / "file").read_bytes() if before else (tmp_path / "file").exists()) == (before or False)
    assert not (tmp_path / WORK).exists()


def write_often(folder, number):
    for i in range(500):
        with appearing(folder / f"{number}-{i}") as file:
            file.write(b"x")


def test_writers_that_remove_the_folder_they_wrote_in_do_not_disturb_one_another(tmp_path):
    writers = [start(write_often, tmp_path, number) for number in range(4)]
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * 4
    assert len(list(tmp_path.iterdir())) == 4 * 500, "every file, and nothing else"


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with appearing_path(tmp_path / "made", folder=True) as partial:
        (partial / "file").write_text("new")
        assert not (tmp_path / "made").exists()
    with pytest.raises(KeyboardInterrupt), appearing_path(tmp_path / "failed", folder=True) as partial:
        (partial / "file").write_text("new")
        raise KeyboardInterrupt
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == ["made", "made/file"]


@pytest.mark.parametrize("below", ["", "below/it"])
def test_a_folder_that_is_a_link_to_nothing_is_an_error_not_a_wait(tmp_path, below):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with (
        pytest.raises(DataError, match="link: a link to nothing; give another"),
        wait_for_lock(tmp_path / "link" / below, "it"),
    ):
        pass
    assert not (tmp_path / "gone").exists()
