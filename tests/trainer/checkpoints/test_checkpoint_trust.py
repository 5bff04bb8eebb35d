"""What is damaged is found and named; what is forged executes nothing."""

import io
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import zlib
from pathlib import PosixPath

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from data.sets.form import ImageForm
from tests.patience import PATIENCE
from tests.trainer.forked import Forked, train_tiny
from trainer.checkpoints import folder as checkpoint
from trainer.checkpoints.files import PIECE
from trainer.errors import RunError
from trainer.ranks import process_group

FORM = ImageForm((1, 8, 8), 10, None, "images")

RANDOM = random.SystemRandom()
LAST = "checkpoints/000000000640"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Finished runs on two ranks, by engine: checkpoints at 160, 320, 480 and 640."""
    runs = {}

    def of(engine):
        if engine not in runs:
            folder = tmp_path_factory.mktemp(engine)
            Forked(folder).run(2, train_tiny, f"run={folder / 'run'}", f"engine={engine}")
            runs[engine] = folder / "run"
        return runs[engine]

    return of


@pytest.fixture
def folder(trained, tmp_path):
    return shutil.copytree(trained("fsdp") / LAST, tmp_path / "000000000640")


def flip(file):
    content = bytearray(file.read_bytes())
    position, bit = RANDOM.randrange(len(content)), RANDOM.randrange(8)
    content[position] ^= 1 << bit
    file.write_bytes(content)
    return f"{file.name}: bit {bit} of byte {position}"


def truncate(file):
    size = RANDOM.randrange(file.stat().st_size)
    os.truncate(file, size)
    return f"{file.name}: {size} bytes"


def lengthen(file):
    file.write_bytes(file.read_bytes() + RANDOM.randbytes(RANDOM.randint(1, 9)))


def replace_by_folder(file):
    file.unlink()
    file.mkdir()


def remove(file):
    file.unlink()


def names(folder):
    found = sorted(path.name for path in folder.iterdir())
    assert found == [".metadata", "__0_0.distcp", "__1_0.distcp", "config.yaml", "manifest.json"]
    return found


def verification(folder):
    """What it says, if the checkpoint is damaged."""
    try:
        checkpoint.verify(folder)
    except RunError as error:
        return str(error)


def test_a_flipped_bit_anywhere_is_found_and_its_file_named(folder):
    for name in names(folder):
        kept = (folder / name).read_bytes()
        for _ in range(5):
            damage = flip(folder / name)
            said = verification(folder)
            assert said and said.startswith(f"{folder / name}: ") and "resume.fallback" in said, damage
            (folder / name).write_bytes(kept)
    assert not verification(folder)


def empty_state(folder):
    state = {}
    for key, entry in read_index(folder).state_dict_metadata.items():
        part, _, name = key.partition(".")
        state.setdefault(part, {})[name] = torch.zeros(entry.size)
    return state


def load_on_ranks(whole, folders, out):
    """What each rank finds wrong with each checkpoint, and whether it has loaded what is stored in the whole one."""
    expected, said = empty_state(whole), []
    with process_group() as ranks:
        checkpoint.load(whole, expected)
        for folder in folders:
            state, error = empty_state(whole), None
            try:
                checkpoint.load(folder, state)
            except RunError as failed:
                error = f"{type(failed).__name__} {failed}"
            same = all(torch.equal(state[part][name], expected[part][name]) for part in state for name in state[part])
            said.append([error, same])
        (out / f"said-{ranks.world_size}-{ranks.rank}.json").write_text(json.dumps(said))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_damage_is_found_on_loading_and_named_by_all_ranks_however_many_they_are(world, ranks, trained, tmp_path):
    """Also where each rank needs all that is stored, but sums a part of the files."""
    whole, files = trained("fsdp") / LAST, []
    for name in names(whole):
        for harm in (flip, flip, truncate, remove):
            folder = shutil.copytree(whole, tmp_path / f"{len(files)}")
            harm(folder / name)
            files.append(folder / name)
    ranks.run(world, load_on_ranks, whole, [whole, *(file.parent for file in files), whole], tmp_path)
    said = [json.loads((tmp_path / f"said-{world}-{rank}.json").read_text()) for rank in range(world)]
    assert all([error for error, _ in one] == [error for error, _ in said[0]] for one in said)
    assert said[0][0] == said[0][-1] == [None, True]
    for file, (error, _) in zip(files, said[0][1:-1], strict=True):
        assert error and error.startswith(f"Damaged {file}: ") and "\n" not in error


def test_the_checksums_are_of_all_bytes_also_of_large_files(tmp_path):
    with process_group():
        checkpoint.save(tmp_path, 1, {"model": {"a": torch.randn(9_000_001)}}, "", FORM)
    contents = {path.name: path.read_bytes() for path in (tmp_path / "000000000001").iterdir()}
    files = json.loads(contents.pop(checkpoint.MANIFEST))["files"]
    assert files == {name: [len(content), zlib.crc32(content)] for name, content in contents.items()}
    assert max(map(len, contents.values())) > 2 * PIECE


@pytest.mark.parametrize("harm", [truncate, lengthen, remove, replace_by_folder])
def test_a_file_of_another_length_or_none_is_found_and_named(harm, trained, tmp_path):
    for name in names(trained("fsdp") / LAST):
        folder = shutil.copytree(trained("fsdp") / LAST, tmp_path / name)
        damage = harm(folder / name)
        said = verification(folder)
        assert said and said.startswith(f"{folder / name}: "), damage
        assert "\n" not in said


@pytest.mark.parametrize("content", ["", "[]", "{}", "null", "7", '"x"', "[1]", '{"crc32": 0}', "\xff", "\0" * 512])
def test_what_is_no_manifest_is_named(content, folder):
    (folder / checkpoint.MANIFEST).write_bytes(content.encode("latin-1"))
    with pytest.raises(RunError, match=r"manifest\.json: not as it was written"):
        checkpoint.verify(folder)


@pytest.mark.parametrize("engine", ["fsdp", "ddp"])
def test_from_a_damaged_checkpoint_a_run_goes_on_only_by_the_one_before_it_and_ends_bit_identical(
    engine, ranks, trained, metrics, tensors, tmp_path
):
    whole, run = trained(engine), tmp_path / "run"
    shutil.copytree(whole, run)
    command = [f"run={run}", f"engine={engine}"]
    file = run / LAST / RANDOM.choice(names(run / LAST))
    damage = RANDOM.choice([flip, truncate])(file)
    before = {path.name: path.read_bytes() for path in (run / LAST).iterdir()}
    line = ranks.fail(2, train_tiny, *command)
    assert f"{file}: " in line and "resume.fallback=true" in line, damage
    assert {path.name: path.read_bytes() for path in (run / LAST).iterdir()} == before, "an error changes nothing"
    said = ranks.run(2, train_tiny, *command, "resume.fallback=true")
    assert f"{file}: " in said and f"continuing from {run}/checkpoints/000000000480" in said, damage
    found = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert found == ["000000000160", "000000000320", "000000000480", "000000000640", "000000000640.damaged"]
    set_aside = run / f"{LAST}.damaged"
    assert {path.name: path.read_bytes() for path in set_aside.iterdir()} == before, "for people to look at"
    checkpoint.verify(run / LAST)
    assert metrics(run) == metrics(whole)
    expected, got = tensors(whole / LAST), tensors(run / LAST)
    assert expected.keys() == got.keys() and all(torch.equal(expected[name], got[name]) for name in expected)


def test_damaged_twice_at_one_position_and_two_in_a_row_the_run_still_goes_on(ranks, trained, metrics, tmp_path):
    whole, run = trained("ddp"), tmp_path / "run"
    shutil.copytree(whole, run)
    for good in (320, 320, 480):
        for late in range(good + 160, 641, 160):
            RANDOM.choice([flip, truncate])(run / f"checkpoints/{late:012d}" / RANDOM.choice(names(whole / LAST)))
        ranks.run(2, train_tiny, f"run={run}", "engine=ddp", "resume.fallback=true")
        complete, incomplete = checkpoint.find(run / "checkpoints")
        assert [int(path.name) for path in complete] == [160, 320, 480, 640] and not incomplete
        for path in complete:
            checkpoint.verify(path)
    assert metrics(run) == metrics(whole)


class Evil:
    """Unpickled, it makes a folder."""

    def __init__(self, made):
        self.made = made

    def __reduce__(self):
        return os.mkdir, (str(self.made),)


def forge(folder):
    """A manifest that agrees with the files: whoever can write the one can write the other."""
    fields = json.loads((folder / checkpoint.MANIFEST).read_text())
    fields.pop("crc32")
    contents = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != checkpoint.MANIFEST}
    fields["files"] = {name: [len(content), zlib.crc32(content)] for name, content in sorted(contents.items())}
    checksum = zlib.crc32(json.dumps(fields).encode())
    (folder / checkpoint.MANIFEST).write_text(json.dumps({**fields, "crc32": checksum}, indent=1))
    checkpoint.verify(folder)


def read_index(folder):
    return pickle.loads((folder / ".metadata").read_bytes())


def write_index(folder, index):
    (folder / ".metadata").write_bytes(index if isinstance(index, bytes) else pickle.dumps(index))
    forge(folder)


def evil_in_place_of_the_index(index, evil):
    return evil


def evil_as_an_entry(index, evil):
    index.state_dict_metadata["ema.evil"] = evil
    return index


def evil_as_planner_data(index, evil):
    index.planner_data = evil
    return index


def evil_as_a_shape(index, evil):
    next(iter(index.state_dict_metadata.values())).size = evil
    return index


def evil_after_the_index(index, evil):
    return pickle.dumps((evil, index))


FORGERIES = [
    evil_in_place_of_the_index,
    evil_as_an_entry,
    evil_as_planner_data,
    evil_as_a_shape,
    evil_after_the_index,
]


def some_state(folder):
    name = next(key for key in read_index(folder).state_dict_metadata if key.startswith("ema."))
    return name, {"ema": {name.removeprefix("ema."): torch.zeros(read_index(folder).state_dict_metadata[name].size)}}


@pytest.mark.parametrize("forgery", FORGERIES)
@pytest.mark.parametrize("protocol", [2, 5])
def test_an_index_that_would_execute_code_is_refused(forgery, protocol, folder, tmp_path):
    _, state = some_state(folder)
    forged = forgery(read_index(folder), Evil(tmp_path / "made"))
    write_index(folder, forged if isinstance(forged, bytes) else pickle.dumps(forged, protocol))
    for look in (lambda: checkpoint.stored_sizes(folder), lambda: checkpoint.load(folder, state)):
        with pytest.raises(RunError, match=r"000000000640/\.metadata: refused, for posix\.mkdir .*execute") as refused:
            look()
        assert "\n" not in str(refused.value)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "named",
    [
        ("builtins", "eval"),
        ("torch", "load"),
        ("torch", "Size.__class__"),
        ("torch.serialization", "os.system"),
        ("torch.distributed.checkpoint.metadata", "Metadata.__init__.__globals__"),
        ("torch.distributed.checkpoint.metadata", "BytesStorageMetadata"),
    ],
)
def test_an_index_may_name_nothing_but_what_an_index_consists_of(named, folder):
    module, name = (pickle.SHORT_BINUNICODE + bytes([len(part)]) + part.encode() for part in named)
    write_index(folder, pickle.PROTO + b"\4" + module + name + pickle.STACK_GLOBAL + pickle.STOP)
    with pytest.raises(RunError, match="refused"):
        checkpoint.stored_sizes(folder)


def test_an_index_changes_no_class_of_this_process(folder):
    """The opcode BUILD would set attributes of a class that is named where an object should be."""
    state = (None, {"poisoned": 1})
    for cls in (PosixPath, Metadata, MetadataIndex, _StorageInfo):
        poison = pickle.GLOBAL + f"{cls.__module__}\n{cls.__name__}\n".encode() + pickle.dumps(state)[2:-1]
        write_index(folder, pickle.PROTO + b"\4" + poison + pickle.BUILD + pickle.STOP)
        with pytest.raises(RunError, match=r"\.metadata: "):
            checkpoint.stored_sizes(folder)
        assert not hasattr(cls, "poisoned")


@pytest.mark.parametrize("index", [b"", b"\x80\x04.", pickle.dumps({}), pickle.dumps([1]), b"\0" * 99])
def test_what_is_no_index_is_named(index, folder):
    write_index(folder, index)
    with pytest.raises(RunError, match=r"\.metadata: ") as error:
        checkpoint.stored_sizes(folder)
    assert "\n" not in str(error.value)


def test_an_index_whose_entries_overlap_or_lie_behind_the_file_is_refused(folder):
    for move in (lambda length: 1, lambda length: -1, lambda length: 10 * length + (1 << 20)):
        kept = {path.name: path.read_bytes() for path in folder.iterdir()}
        index = read_index(folder)
        file = (folder / "__0_0.distcp").name
        place = RANDOM.choice([place for place in index.storage_data.values() if place.relative_path == file][1:-1])
        place.offset += move(place.length)
        write_index(folder, index)
        with pytest.raises(RunError, match="000000000640: cannot be read: what is stored overlaps"):
            checkpoint.load(folder, empty_state(folder))
        for name, content in kept.items():
            (folder / name).write_bytes(content)


def zip_of_evil(evil):
    file = io.BytesIO()
    torch.save(evil, file)
    return file.getvalue()


def old_format_of_evil(evil):
    file = io.BytesIO()
    torch.save(evil, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


@pytest.mark.parametrize("make", [zip_of_evil, old_format_of_evil, pickle.dumps])
def test_contents_that_would_execute_code_are_refused(make, folder, tmp_path):
    """In place of a tensor, appended to a file that the index names; and also as an entry that is no tensor."""
    name, state = some_state(folder)
    index, (target, after) = read_index(folder), (folder / "__1_0.distcp", (folder / "__1_0.distcp").read_bytes())
    content = make(Evil(tmp_path / "made"))
    target.write_bytes(after + content)
    for entry in (entry for entry in index.storage_data if entry.fqn == name):
        index.storage_data[entry] = _StorageInfo(target.name, len(after), len(content))
    write_index(folder, index)
    with pytest.raises(RunError, match="000000000640: cannot be read: ") as error:
        checkpoint.load(folder, state)
    assert "\n" not in str(error.value)
    index.state_dict_metadata[name] = BytesStorageMetadata()  # this one, torch.load would read with weights_only=False
    index.storage_data[MetadataIndex(name)] = _StorageInfo(target.name, len(after), len(content))
    write_index(folder, index)
    with pytest.raises(RunError, match="refused"):
        checkpoint.load(folder, state)
    assert not (tmp_path / "made").exists()


def test_no_tool_and_no_run_executes_a_forged_checkpoint(trained, ranks, tmp_path):
    run = shutil.copytree(trained("ddp"), tmp_path / "run")
    write_index(run / LAST, evil_as_an_entry(read_index(run / LAST), Evil(tmp_path / "made")))
    assert "refused, for posix.mkdir" in ranks.fail(2, train_tiny, f"run={run}", "engine=ddp")
    command = [sys.executable, "tools/sample.py", str(run)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"error: {run / LAST}/.metadata: refused, for posix.mkdir"), done.stderr
    assert not (tmp_path / "made").exists()
