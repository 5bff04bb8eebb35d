"""Checkpoints are in DCP's own form, and their files are read and written whole, whatever their sizes."""

import json
import os
import random
import subprocess
import zlib
from itertools import pairwise

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st

from trainer import checkpoint
from trainer.checkpoint_files import AHEAD, LONG, PIECE, check_file, cut, read_ahead, written
from trainer.errors import RunError

RANDOM = random.SystemRandom()


def random_state(seed):
    """Tensors of many pieces, small ones of one shape and of others, strided, empty, half."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    sizes = [int(size) for size in torch.randint(1, 2000, (40,), generator=generator)]
    shared = normal(100)
    return {
        "model": {
            "large": normal(PIECE // 4 * 5 + seed),
            "turned": normal(50, 20).T,
            "every second": normal(40)[::2],
            "cube": normal(3, 4, 5).permute(2, 0, 1),
            "half": normal(1001).bfloat16(),
            "empty": torch.empty(0, 3),
            **{f"small {i}": normal(size) for i, size in enumerate(sizes)},
        },
        "ema": {"large": normal(PIECE // 4 * 2), **{f"small {i}": normal(7, 3) for i in range(20)}},
        "optimizer": {"state": {"a": {"step": normal(), "first": shared[:50], "second": shared[50:]}}},
    }


def empty(state):
    """Contiguous, whatever the state is."""
    if isinstance(state, dict):
        return {name: empty(value) for name, value in state.items()}
    return torch.full(state.shape, float("nan"), dtype=state.dtype)


def same(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    return torch.equal(one, other)


@pytest.mark.parametrize("seed", range(3))
def test_what_we_save_stock_dcp_loads_bit_for_bit_and_so_do_we(seed, alone, tmp_path):
    state = random_state(seed)
    checkpoint.save(tmp_path, 1, state, "seed: 0\n", "images")
    ours, theirs = empty(state), empty(state)
    assert checkpoint.load(tmp_path / "000000000001", ours) == 1
    dcp.load(theirs, storage_reader=dcp.FileSystemReader(tmp_path / "000000000001"))
    assert same(state, ours) and same(state, theirs)


@pytest.mark.parametrize("seed", range(3))
def test_what_stock_dcp_saved_we_load_bit_for_bit(seed, alone, tmp_path):
    """As checkpoints were, with the sums of each tensor and without; also into strided tensors."""
    state, folder = random_state(seed), tmp_path / "000000000001"
    checkpoint.save(tmp_path, 1, state, "seed: 0\n", "images")
    fields = checkpoint.read_manifest(folder)
    torch.serialization.set_crc32_options(bool(seed % 2))
    for file in folder.glob("*.distcp"):
        file.unlink()
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder, thread_count=seed + 1))
    contents = {file.name: file.read_bytes() for file in folder.iterdir() if file.name != checkpoint.MANIFEST}
    fields["files"] = {name: [len(content), zlib.crc32(content)] for name, content in contents.items()}
    checksum = zlib.crc32(json.dumps(fields).encode())
    (folder / checkpoint.MANIFEST).write_text(json.dumps({**fields, "crc32": checksum}, indent=1))
    loaded = empty(state)
    loaded["model"]["turned"] = torch.zeros(50, 20).T
    assert checkpoint.load(folder, loaded) == 1
    assert len(contents) == seed + 3 and same(state, loaded)


def test_a_part_that_is_loaded_is_right_and_all_files_are_verified(alone, tmp_path):
    state = random_state(7)
    checkpoint.save(tmp_path, 1, state, "", "images")
    folder = tmp_path / "000000000001"
    part = {"ema": empty(state["ema"])}
    checkpoint.load(folder, part)
    assert same(part["ema"], state["ema"])
    index = checkpoint.Reader(folder).read_metadata()
    others = [place for entry, place in index.storage_data.items() if entry.fqn.startswith("model.")]
    for place in RANDOM.sample(others, 5):
        file = folder / place.relative_path
        kept = file.read_bytes()
        at = RANDOM.randrange(place.offset, place.offset + place.length)
        file.write_bytes(kept[:at] + bytes([kept[at] ^ 1]) + kept[at + 1 :])
        with pytest.raises(RunError, match=f"{file.name}: its checksum is not"):
            checkpoint.load(folder, {"ema": empty(state["ema"])})
        file.write_bytes(kept)


def contents():
    """Of sizes about those of pages, pieces and buffers."""
    pieces = [size for piece in (4096, PIECE, LONG) for size in (piece - 1, piece, piece + 1)]
    for size in (0, 1, *pieces, (AHEAD + 2) * LONG, (AHEAD + 1) * LONG + 4099):
        yield RANDOM.randbytes(size)


def check_written(folder):
    sums = {}
    for number, content in enumerate(contents()):
        file, left = folder / f"file {number}", memoryview(content)
        with written(file, sums) as stream:
            while len(left):
                size = RANDOM.choice([1, 30, 5000, PIECE, 3 * PIECE, 2 * LONG])
                assert stream.write(left[:size]) == len(left[:size])
                left = left[size:]
                assert stream.tell() == len(content) - len(left)
        assert file.read_bytes() == content
        assert sums[file.name] == [len(content), zlib.crc32(content)]
        check_file(file, *sums[file.name])
        spans = cut([], len(content))
        assert b"".join(bytes(piece) for _, piece in read_ahead(file, spans)) == content
        if content:
            with pytest.raises(RunError, match="its checksum is not that"):
                check_file(file, len(content), zlib.crc32(content) ^ 1)
            some = sorted(RANDOM.sample(range(len(content) + 1), min(len(content) + 1, 6)))
            spans = list(zip(some[::2], some[1::2], strict=False))
            assert [(start, bytes(piece)) for start, piece in read_ahead(file, spans)] == [
                (start, content[start:stop]) for start, stop in spans
            ]


def test_a_file_is_what_was_written_to_it_and_so_are_its_sum_and_what_is_read_of_it(tmp_path):
    check_written(tmp_path)


def test_also_where_the_file_system_has_no_way_past_the_cache(tmp_path):
    done = subprocess.run(["mount", "-t", "ramfs", "ramfs", tmp_path], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs the right to mount a ramfs: {done.stderr.strip()}")
    try:
        with pytest.raises(OSError, match="Invalid argument"):
            os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
        check_written(tmp_path)
    finally:
        subprocess.run(["umount", "--lazy", tmp_path], check=True)


@given(st.lists(st.integers(0, 3 * PIECE), max_size=12), st.integers(0, 2 * PIECE))
def test_a_file_is_cut_without_gaps_into_spans_that_leave_its_parts_whole(gaps, rest):
    ends = [sum(gaps[: i + 1]) for i in range(len(gaps))]
    parts = [(start, stop) for start, stop in zip(ends[::2], ends[1::2], strict=False) if start < stop]
    size = (ends[-1] if ends else 0) + rest
    spans = cut(parts, size)
    assert [start for start, _ in spans] == [0, *(stop for _, stop in spans[:-1])][: len(spans)]
    assert (spans[-1][1] if spans else 0) == size
    assert all(stop - start >= PIECE for start, stop in spans[:-1])
    assert all(any(first <= start and stop <= last for first, last in spans) for start, stop in parts)
    largest = max((stop - start for start, stop in parts), default=0)
    assert all(stop - start < 2 * PIECE + largest for start, stop in spans)


@given(st.lists(st.integers(1, 100), min_size=2, max_size=9), st.data())
def test_parts_that_overlap_or_lie_behind_the_end_are_refused(lengths, data):
    ends = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    parts = list(pairwise(ends))
    number = data.draw(st.integers(0, len(parts) - 1))
    parts[number] = (parts[number][0], parts[number][1] + data.draw(st.integers(1, 50)))
    with pytest.raises(ValueError, match="overlaps, or lies behind the end"):
        cut(parts, ends[-1])
