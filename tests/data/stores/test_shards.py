"""Writing a store, its index and manifest, and reading it back; what --verify finds."""

import json
import resource
import subprocess
import tarfile
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import webdataset

from data.errors import DataError
from data.extraction.verify import verify_store
from data.stores.files import sha256
from data.stores.shards import (
    INDEX,
    MANIFEST,
    agree_on_settings,
    begin,
    finish,
    keys_digest,
    record_of,
    shard_names,
    write_shard,
)
from data.stores.store import Store, read_manifest
from tests.patience import PATIENCE

SETTINGS = {"name": "some/vae", "size": 8}
LONG = "/".join(["folder-with-a-long-name"] * 5) + "/" + "x" * 180
SIMPLE = [f"c/{i:02d}" for i in range(9)]
KEYS = ["a/plain", "a/with%2Edot", "a/with space", "b/ünï", LONG, "b.dotted.folder/1", "c/1", "c/2"]


def arrays_of(keys, seed, dtype=np.float16):
    rng = np.random.default_rng([seed, len(keys)])
    return {
        "moments": rng.normal(size=(len(keys), 2, 4, 3, 3)).astype(dtype),
        "feature": rng.normal(size=(len(keys), 5)).astype(np.float32),
    }


def make_store(folder, keys=KEYS, cuts=(3, 4), seed=0, dtype=np.float16, kind="latents", classes=9):
    """A store of `keys`, cut into shards; (arrays, labels) that went into it."""
    arrays, labels = arrays_of(keys, seed, dtype), [i % classes for i in range(len(keys))]
    agree_on_settings(folder, SETTINGS)
    parts = np.split(np.arange(len(keys)), cuts)
    for shard, part in zip(shard_names(kind, len(parts)), parts, strict=True):
        some = {name: array[part] for name, array in arrays.items()} if len(part) else {}
        write_shard(folder / shard, [keys[i] for i in part], [labels[i] for i in part], some, [])
    finish(folder, kind, len(parts), classes, 0)
    return arrays, labels


def source_of(keys):
    """What --verify compares with."""
    known = {key: i % 9 for all_keys in (KEYS, SIMPLE) for i, key in enumerate(all_keys)}
    items = [SimpleNamespace(key=key, label=known.get(key, 0)) for key in keys]
    return SimpleNamespace(parts=1, items=lambda part: items)


def problems(folder, keys=KEYS):
    return list(verify_store(folder, source_of(keys)))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("cuts", [(), (3, 4), (0, 8), (1, 2, 3, 4, 5, 6, 7)])
def test_what_is_read_is_what_was_written(tmp_path, dtype, cuts):
    arrays, labels = make_store(tmp_path, cuts=cuts, dtype=dtype)
    store = Store(tmp_path, read_manifest(tmp_path, "latents", "it"))
    assert len(store) == len(KEYS)
    assert [key.decode() for key in store.index["key"]] == KEYS
    assert store.index["label"].tolist() == labels
    rng = np.random.default_rng(0)
    for _ in range(5):
        numbers, entry = rng.integers(len(KEYS), size=20), rng.integers(2, size=20)
        for name, array in arrays.items():
            read = store.read(name, numbers)
            assert read.dtype == array.dtype
            np.testing.assert_array_equal(read, array[numbers])
        np.testing.assert_array_equal(store.read("moments", numbers, entry), arrays["moments"][numbers, entry])
    assert problems(tmp_path) == []


def test_the_index_points_at_the_bytes_themselves(tmp_path):
    arrays, _ = make_store(tmp_path)
    index, manifest = np.load(tmp_path / INDEX), json.loads((tmp_path / MANIFEST).read_text())
    for i, row in enumerate(index):
        with (tmp_path / manifest["shards"][row["shard"]]["name"]).open("rb") as file:
            for name, array in arrays.items():
                file.seek(row[name])
                assert file.read(array[i].nbytes) == array[i].tobytes()


def test_tar_and_webdataset_read_the_shards(tmp_path):
    arrays, labels = make_store(tmp_path, cuts=(3,))
    shards = [tmp_path / name for name in shard_names("latents", 2)]
    listed = [subprocess.run(["tar", "tf", s], capture_output=True, check=True).stdout.decode() for s in shards]
    members = "".join(listed).splitlines()
    assert len(members) == 3 * len(KEYS) and f"{LONG}.moments.npy" in members
    samples = list(webdataset.WebDataset([str(s) for s in shards], shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == KEYS
    assert [sample["cls"] for sample in samples] == labels
    for name, array in arrays.items():
        np.testing.assert_array_equal(np.stack([sample[f"{name}.npy"] for sample in samples]), array)


def test_the_manifest_tells_what_is_there(tmp_path):
    make_store(tmp_path, classes=9)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    assert manifest["images"] == len(KEYS) and manifest["num_classes"] == 9 and manifest["settings"] == SETTINGS
    assert manifest["keys"] == keys_digest(np.array([key.encode() for key in KEYS]))
    assert [shard["images"] for shard in manifest["shards"]] == [3, 1, 4]
    assert [shard["sha256"] for shard in manifest["shards"]] == [
        sha256(tmp_path / s["name"]) for s in manifest["shards"]
    ]
    assert not (tmp_path / ".work").exists()


def test_an_unfinished_store_has_no_manifest_and_cannot_be_read(tmp_path):
    agree_on_settings(tmp_path, SETTINGS)
    write_shard(tmp_path / shard_names("latents", 2)[0], ["a"], [0], arrays_of(["a"], 0), [])
    assert finish(tmp_path, "latents", 2, None, 0) is None
    with pytest.raises(DataError, match=r"no manifest\.json in it.*make it with the tool"):
        read_manifest(tmp_path, "latents", "the tool")


def test_a_store_of_another_kind_is_refused(tmp_path):
    make_store(tmp_path, kind="features")
    with pytest.raises(DataError, match="holds features, not latents"):
        read_manifest(tmp_path, "latents", "the tool")


@pytest.mark.parametrize(("name", "value"), [("size", 16), ("new", 1)])
def test_other_settings_are_refused_with_both_values(tmp_path, name, value):
    agree_on_settings(tmp_path, SETTINGS)
    agree_on_settings(tmp_path, SETTINGS | {"name": "the same weights elsewhere"})
    with pytest.raises(DataError, match=rf"^{name}={value}: .* begun with {name}={SETTINGS.get(name)}; "):
        agree_on_settings(tmp_path, SETTINGS | {name: value})


def test_a_key_that_comes_twice_is_refused(tmp_path):
    with pytest.raises(DataError, match="a/1 comes 2 times"):
        make_store(tmp_path, keys=["a/1", "a/2", "a/1"], cuts=(2,))
    assert not (tmp_path / MANIFEST).exists()


def test_an_image_that_was_rejected_is_listed_and_needs_leave(tmp_path):
    agree_on_settings(tmp_path, SETTINGS)
    shards = [tmp_path / name for name in shard_names("latents", 2)]
    rejected = [{"key": "c/1", "file": "c/1.jpg", "reason": "broken"}]
    write_shard(shards[0], KEYS[:6], [0, 1, 2, 3, 4, 5], arrays_of(KEYS[:6], 0), rejected)
    write_shard(shards[1], KEYS[7:], [7], arrays_of(KEYS[7:], 0), [])
    with pytest.raises(DataError, match="1 images could not be read, more than --max-rejects 0"):
        finish(tmp_path, "latents", 2, None, 0)
    assert not (tmp_path / MANIFEST).exists()
    assert finish(tmp_path, "latents", 2, None, 1)["rejected"] == 1
    assert json.loads((tmp_path / "rejected.jsonl").read_text()) == {"shard": shards[0].name, **rejected[0]}
    assert problems(tmp_path) == []


def finish_all(folder, barrier, queue):
    barrier.wait()
    queue.put(finish(folder, "latents", 3, 9, 0))


def test_processes_that_finish_at_once_leave_one_manifest(tmp_path):
    arrays, labels = arrays_of(KEYS, 0), list(range(8))
    agree_on_settings(tmp_path, SETTINGS)
    for shard, part in zip(shard_names("latents", 3), np.split(np.arange(8), (3, 4)), strict=True):
        some = {name: array[part] for name, array in arrays.items()}
        write_shard(tmp_path / shard, [KEYS[i] for i in part], [labels[i] for i in part], some, [])
    context = get_context("fork")
    barrier, queue = context.Barrier(6), context.Queue()
    processes = [context.Process(target=finish_all, args=(tmp_path, barrier, queue)) for _ in range(6)]
    for process in processes:
        process.start()
    manifests = [queue.get(timeout=PATIENCE) for _ in processes]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert all(manifest == manifests[0] for manifest in manifests)
    assert manifests[0] == json.loads((tmp_path / MANIFEST).read_text())
    assert problems(tmp_path) == []


# what --verify must find


def rewrite(folder, shard, change):
    """Replace a shard's samples, and make manifest and record agree with the false tar, so no checksum tells."""
    path = folder / shard
    with tarfile.open(path) as tar:
        members = [(m.name, tar.extractfile(m).read()) for m in tar]
    record = json.loads(record_of(path).read_text())
    fields = {m: (m.partition(".")[0], data) for m, data in members}
    samples = {}
    for name, (key, data) in fields.items():
        samples.setdefault(key, {"__key__": key})[name.partition(".")[2]] = data
    changed = change(list(samples.values()))
    with path.open("wb") as file, webdataset.TarWriter(file, encoder=False, mtime=0) as tar:
        for sample in changed:
            tar.write(sample)
    manifest = json.loads((folder / MANIFEST).read_text())
    for entry in manifest["shards"]:
        if entry["name"] == shard:
            entry["sha256"] = sha256(path)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    record_of(path).write_text(json.dumps(record | {"sha256": sha256(path)}))


def test_verify_finds_a_missing_key_although_the_checksums_were_mended(tmp_path):
    make_store(tmp_path, keys=SIMPLE)
    rewrite(tmp_path, "latents-000002.tar", lambda samples: samples[:-1])
    found = problems(tmp_path, SIMPLE)
    assert any("c/08: 0 times in the store, 1 times in the input" in line for line in found), found
    assert any("in the index and not in the shard" in line for line in found)


def test_verify_finds_a_doubled_key_although_the_checksums_were_mended(tmp_path):
    make_store(tmp_path, keys=SIMPLE)
    with tarfile.open(tmp_path / "latents-000000.tar") as tar:
        first = {m.name.partition(".")[2]: tar.extractfile(m).read() for m in tar if m.name.startswith("c/00")}
    rewrite(tmp_path, "latents-000002.tar", lambda samples: [*samples, {"__key__": "c/00", **first}])
    assert any("c/00: 2 times in the store, 1 times in the input" in line for line in problems(tmp_path, SIMPLE))


def test_verify_finds_a_changed_label_although_the_checksums_were_mended(tmp_path):
    make_store(tmp_path, keys=SIMPLE)
    rewrite(tmp_path, "latents-000000.tar", lambda samples: [{**samples[0], "cls": b"5"}, *samples[1:]])
    assert any("c/00 has label" in line for line in problems(tmp_path, SIMPLE))


@pytest.mark.parametrize("seed", range(6))
def test_verify_finds_a_flipped_byte(tmp_path, seed):
    make_store(tmp_path, keys=SIMPLE)
    path = tmp_path / f"latents-{seed % 3:06d}.tar"
    content = bytearray(path.read_bytes())
    content[int(np.random.default_rng(seed).integers(len(content)))] ^= 1 << seed
    path.write_bytes(content)
    assert any(path.name in line and "checksum" in line for line in problems(tmp_path, SIMPLE))


@pytest.mark.parametrize("length", [0, 700, 3000])
def test_verify_finds_a_shard_that_was_cut_off(tmp_path, length):
    make_store(tmp_path, keys=SIMPLE)
    path = tmp_path / "latents-000002.tar"
    path.write_bytes(path.read_bytes()[:length])
    found = problems(tmp_path, SIMPLE)
    assert any(path.name in line and "checksum" in line for line in found)
    assert any("c/08: 0 times" in line for line in found)


def test_verify_finds_a_shard_that_is_gone(tmp_path):
    make_store(tmp_path, keys=SIMPLE)
    (tmp_path / "latents-000001.tar").unlink()
    assert any("latents-000001.tar: not there" in line for line in problems(tmp_path, SIMPLE))


@pytest.mark.parametrize("column", ["label", "moments", "feature", "key", "shard"])
def test_verify_finds_a_false_index(tmp_path, column):
    make_store(tmp_path, keys=SIMPLE)
    index = np.load(tmp_path / INDEX)
    index[column][4] = b"c/44" if column == "key" else index[column][4] + 1
    np.save(tmp_path / INDEX, index)
    assert problems(tmp_path, SIMPLE)


@pytest.mark.parametrize(
    ("keys", "line"), [(SIMPLE[1:], "c/00: 1 times in the store, 0"), ([*SIMPLE, "d/1"], "d/1: 0 ")]
)
def test_verify_finds_that_the_input_is_another(tmp_path, keys, line):
    make_store(tmp_path, keys=SIMPLE)
    assert [line in problem for problem in problems(tmp_path, keys)] == [True]


def test_no_manifest_stands_beside_shards_that_were_made_again(tmp_path):
    """Otherwise images would be read at the offsets of others."""
    make_store(tmp_path, keys=SIMPLE)
    shards = [tmp_path / name for name in shard_names("latents", 3)]
    begin(tmp_path, shards)
    assert (tmp_path / MANIFEST).exists()
    shards[1].unlink()
    begin(tmp_path, shards)
    assert not (tmp_path / MANIFEST).exists()
    write_shard(shards[1], [], [], {}, [{"key": SIMPLE[3], "file": "f", "reason": "broken"}])
    with pytest.raises(DataError, match="1 images"):
        finish(tmp_path, "latents", 3, 9, 0)
    assert not (tmp_path / MANIFEST).exists()
    assert finish(tmp_path, "latents", 3, 9, 1)["images"] == len(SIMPLE) - 1
    assert problems(tmp_path, SIMPLE) == []


def test_a_store_of_more_shards_than_files_may_be_open_is_read(tmp_path):
    keys = [f"c/{i:03d}" for i in range(90)]
    arrays, _ = make_store(tmp_path, keys=keys, cuts=range(1, 90))
    store = Store(tmp_path, read_manifest(tmp_path, "latents", "it"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 20, hard))
    try:
        np.testing.assert_array_equal(store.read("moments", np.arange(90)), arrays["moments"])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("share", [0, 0.3, 0.5, None])
def test_a_shard_that_is_cut_or_gone_is_named_by_what_reads_it(tmp_path, share):
    make_store(tmp_path, cuts=(3,))
    shard = sorted(tmp_path.glob("*.tar"))[1]
    if share is None:
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[: int(share * shard.stat().st_size)])
    store = Store(tmp_path, read_manifest(tmp_path, "latents", "it"))
    assert len(store.read("moments", np.arange(3))) == 3
    with pytest.raises(DataError, match=f"{shard.name}: .* start what made .* again"):
        store.read("moments", np.arange(len(store)))
