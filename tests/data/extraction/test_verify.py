"""What --verify must find when someone has been at a store; each alone, and although all checksums agree with it."""

import json
import runpy
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from data.extraction.crop import center_crop
from data.extraction.extract import Work, extract
from data.stores.files import sha256
from data.stores.shards import INDEX, MANIFEST, REJECTED, keys_digest, record_of

DAMAGED = "b/2"


def encode(batch):
    return {"moments": batch.numpy().astype(np.float32), "feature": batch.numpy().mean(axis=(1, 2)).astype(np.float16)}


def make(images, out):
    settings = {"name": "mean colour"}
    prepare = lambda image: center_crop(image, 4)  # noqa: E731
    extract(Work("latents", images, out, settings, prepare, encode, part_size=4, batch=3, workers=0, max_rejects=1))


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A folder with 14 images in three classes, one of them damaged, and the store of them in four shards."""
    folder = tmp_path_factory.mktemp("verify")
    rng = np.random.default_rng(0)
    for i in range(14):
        path = folder / f"images/{'abc'[i % 3]}/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(256, size=(5, 6, 3), dtype=np.uint8)).save(path)
    (folder / "images/b/2.png").write_bytes(b"")
    make(folder / "images", folder / "store")
    return folder


@pytest.fixture
def folder(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "folder"))


@pytest.fixture
def verify(folder, monkeypatch, capsys):
    """The tool's exit code and the lines it prints."""

    def run():
        monkeypatch.syspath_prepend("tools")
        options = ["--images", folder / "images", "--out", folder / "store", "--verify"]
        monkeypatch.setattr(sys, "argv", ["precompute_latents.py", *map(str, options)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            runpy.run_path("tools/precompute_latents.py", run_name="__main__")
        return end.value.code, capsys.readouterr().out.splitlines()

    return run


def keys_of(folder):
    return [key.decode() for key in np.load(folder / "store" / INDEX)["key"]]


def samples_of(shard):
    samples = {}
    with tarfile.open(shard) as tar:
        for member in tar:
            key, _, extension = member.name.partition(".")
            samples.setdefault(key, {})[extension] = tar.extractfile(member).read()
    return list(samples.items())


def forge(folder, number, change):
    """Change the samples of a shard, and make record, index, manifest and every checksum agree with it."""
    store = folder / "store"
    shard = store / f"latents-{number:06d}.tar"
    changed = change(samples_of(shard))
    with shard.open("wb") as file, webdataset.TarWriter(file, encoder=False, mtime=0, format="PAX_FORMAT") as tar:
        for key, members in changed:
            tar.write({"__key__": key, **members})
    index, manifest = np.load(store / INDEX), json.loads((store / MANIFEST).read_text())
    rows = np.zeros(len(changed), index.dtype)
    rows["shard"] = number
    with tarfile.open(shard) as tar:
        members = iter(list(tar))
        for row, (key, fields) in zip(rows, changed, strict=True):
            row["key"], row["label"] = key.encode(), int(fields["cls"])
            for _ in range(3):
                member = next(members)
                field = member.name.partition(".")[2].removesuffix(".npy")
                if field != "cls":
                    row[field] = member.offset_data + member.size - {"moments": 4 * 4 * 3 * 4, "feature": 6}[field]
    index = np.concatenate([index[index["shard"] < number], rows, index[index["shard"] > number]])
    np.save(store / INDEX, index)
    manifest |= {"images": len(index), "keys": keys_digest(index["key"])}
    manifest["shards"][number] |= {"images": len(rows), "sha256": sha256(shard)}
    (store / MANIFEST).write_text(json.dumps(manifest))
    record = json.loads(record_of(shard).read_text())
    record |= {"images": len(rows), "sha256": sha256(shard)}
    record |= {"keys": [key for key, _ in changed], "labels": [int(fields["cls"]) for _, fields in changed]}
    record["offsets"] = {field: rows[field].tolist() for field in ("feature", "moments")}
    record_of(shard).write_text(json.dumps(record))


def test_nothing_is_found_in_an_unharmed_store_nor_in_one_that_was_forged_without_a_change(folder, verify):
    assert verify() == (0, [f"{folder / 'store'}: verified: every image once, every byte as written"])
    for number in range(4):
        forge(folder, number, lambda samples: samples)
    assert verify()[0] == 0


@pytest.mark.parametrize(
    ("change", "times"),
    [
        (lambda samples: samples[1:], 0),
        (lambda samples: [*samples, samples[0]], 2),
        (lambda samples: [samples[0], *samples], 2),
        (lambda samples: [*samples, samples[0], samples[0]], 3),
        (lambda samples: [*samples[1:], ("c/z", samples[0][1])], 0),
    ],
    ids=["missing", "doubled", "doubled in a row", "tripled", "renamed"],
)
@pytest.mark.parametrize("number", [0, 3])
def test_a_key_that_is_not_there_once_is_named_although_all_checksums_agree(folder, verify, number, change, times):
    key = samples_of(folder / f"store/latents-{number:06d}.tar")[0][0]
    forge(folder, number, change)
    code, lines = verify()
    assert code == 1
    assert f"{key}: {times} times in the store, 1 times in the input" in lines
    assert all(key in line or "c/z" in line for line in lines), lines


def test_a_key_that_stands_in_two_shards_is_named_although_all_checksums_agree(folder, verify):
    first = samples_of(folder / "store/latents-000000.tar")[0]
    forge(folder, 3, lambda samples: [*samples, first])
    assert verify() == (1, [f"{first[0]}: 2 times in the store, 1 times in the input"])


def test_a_label_other_than_the_inputs_is_named_although_all_checksums_agree(folder, verify):
    key = samples_of(folder / "store/latents-000001.tar")[0][0]
    forge(folder, 1, lambda samples: [(samples[0][0], samples[0][1] | {"cls": b"2"}), *samples[1:]])
    code, lines = verify()
    assert code == 1
    assert any(key in line and "label" in line for line in lines)


@pytest.mark.parametrize("seed", range(8))
def test_a_flipped_bit_anywhere_is_found_and_its_shard_named(folder, verify, seed):
    rng = np.random.default_rng(seed)
    shard = folder / f"store/latents-{rng.integers(4):06d}.tar"
    content = bytearray(shard.read_bytes())
    content[rng.integers(len(content))] ^= 1 << rng.integers(8)
    shard.write_bytes(content)
    code, lines = verify()
    assert code == 1 and str(shard) in lines[0]


@pytest.mark.parametrize("length", [0, 1, 512, 0.3, 0.7, -10240, -1])
def test_a_shard_that_was_cut_off_is_named(folder, verify, length):
    shard = folder / "store/latents-000002.tar"
    content = shard.read_bytes()
    shard.write_bytes(content[: int(length * len(content)) if isinstance(length, float) else length])
    code, lines = verify()
    assert code == 1 and str(shard) in lines[0]


def test_a_shard_that_is_gone_is_named_with_all_its_images(folder, verify):
    shard = folder / "store/latents-000001.tar"
    keys = [key for key, _ in samples_of(shard)]
    shard.unlink()
    code, lines = verify()
    assert code == 1
    assert lines == [f"{shard}: not there", *(f"{k}: 0 times in the store, 1 times in the input" for k in sorted(keys))]


def test_a_shard_in_another_ones_place_is_named(folder, verify):
    shutil.copy(folder / "store/latents-000000.tar", folder / "store/latents-000002.tar")
    code, lines = verify()
    assert code == 1 and "latents-000002.tar" in lines[0]


def exchange(index, field):
    index[field][[2, 5]] = index[field][[5, 2]]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("field", ["label", "moments", "feature", "shard"])
def test_one_wrong_number_in_the_index_is_found_and_its_image_named(folder, verify, field, seed):
    rng = np.random.default_rng(seed)
    index = np.load(folder / "store" / INDEX)
    row = rng.integers(len(index))
    other = rng.choice(np.setdiff1d(index[field], index[field][row]))
    index[field][row] = [other, index[field][row] + 512, -1][seed]
    np.save(folder / "store" / INDEX, index)
    code, lines = verify()
    assert code == 1 and any(index["key"][row].decode() in line for line in lines)


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index[1:],
        lambda index: np.concatenate([index, index[-1:]]),
        lambda index: index[::-1],
        lambda index: index[[1, 0, *range(2, len(index))]],
        lambda index: index[:0],
    ],
    ids=["row gone", "row doubled", "reversed", "two exchanged", "empty"],
)
def test_another_index_than_the_one_that_was_written_is_found(folder, verify, change):
    np.save(folder / "store" / INDEX, change(np.load(folder / "store" / INDEX)))
    code, lines = verify()
    assert code == 1 and INDEX in lines[0]


def test_images_that_come_to_or_go_from_the_input_are_named(folder, verify):
    keys = keys_of(folder)
    (folder / f"images/{keys[5]}.png").unlink()
    assert verify() == (1, [f"{keys[5]}: 1 times in the store, 0 times in the input"])
    shutil.copy(folder / f"images/{keys[0]}.png", folder / f"images/{keys[5]}.png")
    assert verify()[0] == 0, "the pixels of the input are not read"
    shutil.copy(folder / f"images/{keys[0]}.png", folder / "images/c/new.png")
    assert verify() == (1, ["c/new: 0 times in the store, 1 times in the input"])


def test_a_class_folder_that_comes_to_the_input_and_changes_the_labels_is_found(folder, verify):
    (folder / "images/aa").mkdir()
    code, lines = verify()
    assert code == 1 and any("label" in line for line in lines)


def test_an_image_that_was_rejected_is_counted_as_listed_once(folder, verify):
    listed = folder / "store" / REJECTED
    assert json.loads(listed.read_text())["key"] == DAMAGED
    row = listed.read_text()
    listed.write_text("")
    assert verify() == (1, [f"{DAMAGED}: 0 times in the store, 1 times in the input"])
    listed.write_text(2 * row)
    assert verify() == (1, [f"{DAMAGED}: 2 times in the store, 1 times in the input"])
    listed.write_text(row + row.replace(DAMAGED, keys_of(folder)[0]))
    assert verify() == (1, [f"{keys_of(folder)[0]}: 2 times in the store, 1 times in the input"])


@pytest.mark.parametrize("name", [INDEX, MANIFEST, REJECTED])
@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_file_of_the_store_that_is_gone_or_cut_off_is_named(folder, verify, name, damage):
    path = folder / "store" / name
    content = path.read_bytes()
    path.unlink() if damage == "gone" else path.write_bytes(content[: len(content) // 2])
    code, lines = verify()
    assert code == 1 and len(lines) == 1 and lines[0].startswith(str(folder / "store")), lines


def test_a_store_that_is_not_complete_is_not_verified(folder, verify):
    shutil.rmtree(folder / "store")
    code, lines = verify()
    assert code == 1 and len(lines) == 1 and MANIFEST in lines[0]
