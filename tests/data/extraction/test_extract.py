"""Extraction shared by processes that are killed: every image once, and what one process would leave."""

import multiprocessing
import os
import random
import signal
import threading
import time

import numpy as np
import pytest
from PIL import Image
from tqdm import tqdm

from data.extraction.extract import Work, extract
from data.extraction.sources import list_source
from data.extraction.verify import verify_store
from data.stores.files import WORK
from data.stores.shards import MANIFEST
from tests.stores import encoded, shards, stored, write

NUMBERS = 160


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """Images that show their number; it is in their name too."""
    root = tmp_path_factory.mktemp("numbered")
    for i in range(NUMBERS):
        write(root / f"c{i % 2}/{i:03d}.png", encoded(Image.new("RGB", (8, 8), (i, 0, i % 7))))
    return root


def as_array(image):
    return np.asarray(image)


def work_of(images, out, log=None, seed=0):
    """Encoding leaves the images as they are, takes a random while, and notes who did it."""
    rng = random.Random(seed)

    def encode(batch):
        numbers = batch[:, 0, 0, 0].tolist()
        if log:
            with log.open("a") as file:
                file.write("".join(f"{number} {os.getpid()}\n" for number in numbers))
            time.sleep(rng.uniform(0, 0.008))
        return {"pixels": batch.numpy()}

    return Work("latents", images, out, {"name": "none"}, as_array, encode, 4, 2, workers=0, max_rejects=0)


def run_extract(images, out, log, seed, process, processes):
    tqdm.set_lock(threading.RLock())  # its own: who is killed with the one that forks share keeps it for ever
    extract(work_of(images, out, log, seed), process, processes)


def start_extract(images, out, log, rng, processes):
    context = multiprocessing.get_context("fork")
    started = [
        context.Process(target=run_extract, args=(images, out, log, rng.random(), i, processes))
        for i in range(processes)
    ]
    for process in started:
        process.start()
    return started


def wait_for_work(log):
    while not log.exists() or log.read_text().count("\n") < 10:
        time.sleep(0.001)


def encoded_by(log):
    """Number of an image -> the processes that encoded it, in this order."""
    found = {}
    for line in log.read_text().splitlines():
        number, pid = line.split()
        found.setdefault(int(number), []).append(int(pid))
    return found


@pytest.fixture(scope="module")
def undisturbed(numbered, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    extract(work_of(numbered, out))
    for key, (label, pixels) in stored(out, "pixels").items():
        assert (pixels[..., 0] == int(key[-3:])).all() and label == int(key[-3:]) % 2
    return [content for content, _ in shards(out).values()]


@pytest.mark.parametrize("seed", range(2))
def test_processes_at_once_encode_every_image_once_and_leave_what_one_leaves(numbered, undisturbed, tmp_path, seed):
    out, log = tmp_path / "out", tmp_path / "log"
    processes = start_extract(numbered, out, log, random.Random(seed), 4)
    for process in processes:
        process.join()
        assert process.exitcode == 0
    done = encoded_by(log)
    assert sorted(done) == list(range(NUMBERS)) and all(len(pids) == 1 for pids in done.values())
    assert len({pids[0] for pids in done.values()}) == 4, "they shared it"
    assert [content for content, _ in shards(out).values()] == undisturbed
    assert list(verify_store(out, list_source(numbered, 9))) == []
    assert not (out / WORK).exists()


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_and_started_again_on_other_numbers_of_processes_only_the_work_of_the_dead_is_done_again(
    numbered, undisturbed, tmp_path, seed
):
    out, log, rng = tmp_path / "out", tmp_path / "log", random.Random(seed)
    killed, rounds = set(), 0
    while not (out / MANIFEST).exists():
        rounds += 1
        assert rounds < 60
        processes = start_extract(numbered, out, log, rng, rng.randrange(1, 6))
        wait_for_work(log)
        for process in processes:
            time.sleep(rng.uniform(0, 0.06 if rounds > 1 else 0.01))
            if rounds == 1 or rng.random() < 0.8:
                process.kill()
                killed.add(process.pid)
        for process in processes:
            process.join()
            assert process.exitcode in (0, -signal.SIGKILL)
        for content in (content for content, _ in shards(out).values()):
            assert content in undisturbed, "whole, or not there"
    done = encoded_by(log)
    assert sorted(done) == list(range(NUMBERS))
    assert all(set(pids[:-1]) <= killed for pids in done.values()), "who is not killed loses nothing"
    assert rounds > 1
    extract(work_of(numbered, out, log))
    assert encoded_by(log) == done, "and once complete nothing is encoded"
    assert [content for content, _ in shards(out).values()] == undisturbed
    assert list(verify_store(out, list_source(numbered, 9))) == []
    assert not (out / WORK).exists()


def test_a_process_that_is_stopped_keeps_its_part_and_one_that_is_killed_gives_it_up(numbered, undisturbed, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    (slow,) = start_extract(numbered, out, log, random.Random(0), 1)
    try:
        wait_for_work(log)
        os.kill(slow.pid, signal.SIGSTOP)
        assert extract(work_of(numbered, out)) is None, "its part is not there"
        assert NUMBERS // 4 - 2 <= len(shards(out)) < NUMBERS // 4, "but for the one it encodes and the one it writes"
    finally:
        slow.kill()
        slow.join()
    assert extract(work_of(numbered, out))["images"] == NUMBERS
    assert [content for content, _ in shards(out).values()] == undisturbed
