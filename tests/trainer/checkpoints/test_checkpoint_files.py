"""Checkpoints are in DCP's own form, and their files are read and written whole, whatever their sizes."""

import json
import os
import random
import subprocess
import zlib

import pytest
import torch
import torch.distributed.checkpoint as dcp

from data.sets.form import ImageForm
from trainer.checkpoints import folder as checkpoint
from trainer.checkpoints.files import AHEAD, PIECE, Source, check_file, written
from trainer.errors import RunError

FORM = ImageForm((1, 8, 8), 10, None, "images")

RANDOM = random.SystemRandom()


def random_state(seed):
    """Tensors of many pieces, large and small ones of one shape and of others, strided, empty, half."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    sizes = [int(size) for size in torch.randint(1, 2000, (40,), generator=generator)]
    shared = normal(100)
    return {
        "model": {
            "large": normal(PIECE // 4 * 2 + seed),
            **{f"wide {i}": normal(300, 100) for i in range(4)},
            **{f"wide half {i}": normal(300, 150).bfloat16() for i in range(3)},
            **{f"wide turned {i}": normal(100, 300).T for i in range(3)},
            "turned": normal(50, 20).T,
            "every second": normal(40)[::2],
            "cube": normal(3, 4, 5).permute(2, 0, 1),
            "half": normal(1001).bfloat16(),
            "empty": torch.empty(0, 3),
            **{f"small {i}": normal(size) for i, size in enumerate(sizes)},
        },
        "ema": {"large": normal(PIECE // 4 * 2 + seed), **{f"small {i}": normal(7, 3) for i in range(20)}},
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
    checkpoint.save(tmp_path, 1, state, "seed: 0\n", FORM)
    ours, theirs = empty(state), empty(state)
    assert checkpoint.load(tmp_path / "000000000001", ours) == 1
    dcp.load(theirs, storage_reader=dcp.FileSystemReader(tmp_path / "000000000001"))
    assert same(state, ours) and same(state, theirs)


@pytest.mark.parametrize("seed", range(3))
def test_what_stock_dcp_saved_we_load_bit_for_bit(seed, alone, tmp_path):
    """As checkpoints were, with the sums of each tensor and without; also into strided tensors."""
    state, folder = random_state(seed), tmp_path / "000000000001"
    checkpoint.save(tmp_path, 1, state, "seed: 0\n", FORM)
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
    loaded["model"] |= {"turned": torch.zeros(50, 20).T, "wide 2": torch.zeros(100, 300).T}
    loaded["model"] |= {"wide 3": torch.zeros(600, 100)[::2], "wide half 1": torch.zeros(300, 150)}
    assert checkpoint.load(folder, loaded) == 1
    assert len(contents) == seed + 3 and same(state, loaded)


def test_a_part_that_is_loaded_is_right_and_all_files_are_verified(alone, tmp_path):
    state = random_state(7)
    checkpoint.save(tmp_path, 1, state, "", FORM)
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
    pieces = [size for piece in (4096, PIECE) for size in (piece - 1, piece, piece + 1)]
    for size in (0, 1, *pieces, (AHEAD + 2) * PIECE, (AHEAD + 1) * PIECE + 4099):
        yield RANDOM.randbytes(size)


def check_written(folder):
    sums = {}
    for number, content in enumerate(contents()):
        file, left = folder / f"file {number}", memoryview(content)
        with written(file, sums) as stream:
            while len(left):
                size = RANDOM.choice([1, 30, 5000, PIECE, 3 * PIECE])
                assert stream.write(left[:size]) == len(left[:size])
                left = left[size:]
                assert stream.tell() == len(content) - len(left)
        assert file.read_bytes() == content
        assert sums[file.name] == [len(content), zlib.crc32(content)]
        check_file(file, *sums[file.name])
        if content:
            with pytest.raises(RunError, match="its checksum is not that"):
                check_file(file, len(content), zlib.crc32(content) ^ 1)
        check_read(file, content)


def check_read(file, content):
    cuts = sorted(RANDOM.choices(range(len(content) + 1), k=6))
    for summed in (True, False):
        with file.open("rb", buffering=0) as stream:
            source = Source(stream, summed)
            for start, stop in zip(cuts[::2], cuts[1::2], strict=True):
                source.pass_to(start)
                source.read_into(room := memoryview(bytearray(stop - start)))
                assert room == content[start:stop] and source.position == stop
            source.pass_to(len(content))
            assert not summed or source.checksum == zlib.crc32(content)
            with pytest.raises(EOFError, match=f"ends at byte {len(content)}"):
                source.read_into(memoryview(bytearray(1)))
            if content:
                with pytest.raises(ValueError, match="was read already"):
                    source.pass_to(len(content) - 1)


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
