import io
import os
import tarfile

import numpy as np
import pytest
import webdataset
from PIL import Image

from data.errors import DataError
from data.extraction.sources import key_of, list_source, open_source, shared_source


def picture(seed=0, side=8):
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(256, size=(side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def fill(root, names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture(abs(hash(name)) % 1000))


NAMES = [
    "a/1.jpg",
    "a/2.JPEG",
    "a/deep/er/3.png",
    "b/x.y.jpg",
    "b/x%2Ey.jpg",
    "b/ü ö.webp",
    "empty/note.txt",
    "z/9.bmp",
]


@pytest.mark.parametrize("part_size", [1, 2, 3, 7, 100])
def test_class_folders_give_every_image_once_with_the_number_of_its_class(tmp_path, part_size):
    fill(tmp_path, NAMES)
    source = list_source(tmp_path, part_size)
    items = [item for part in range(source.parts) for item in source.items(part)]
    assert [item.file.relative_to(tmp_path).as_posix() for item in items] == [
        n for n in sorted(NAMES) if "txt" not in n
    ]
    assert [item.label for item in items] == [["a", "b", "empty", "z"].index(i.key.split("/")[0]) for i in items]
    assert source.images == len(items) == 7 and source.num_classes == 4, "an empty class keeps its number"
    assert max(len(source.items(part)) for part in range(source.parts)) <= part_size
    assert len({item.key for item in items}) == 7
    for item in items:
        assert item.read() == item.file.read_bytes()
        assert "." not in item.key.rpartition("/")[2], "webdataset would end the key there"


def test_a_source_reopened_from_its_listing_is_the_same_although_files_were_added(tmp_path):
    fill(tmp_path / "in", NAMES)
    first = shared_source(tmp_path / "in", 3, tmp_path / "out")
    fill(tmp_path / "in", ["a/0.jpg", "c/1.jpg"])
    again = shared_source(tmp_path / "in", 3, tmp_path / "out")
    assert [again.items(p) for p in range(again.parts)] == [first.items(p) for p in range(first.parts)]
    assert open_source(tmp_path / "in", first.listing(), 3).items(0) == first.items(0)


def test_keys_are_paths_without_the_extension_and_never_the_same_for_two_stems():
    assert key_of("n01/n01_1.JPEG") == "n01/n01_1"
    stems = ["a.b", "a%2Eb", "a%b", "ab", "a..b", "a%252Eb"]
    assert len({key_of(f"c/{stem}.jpg") for stem in stems}) == len(stems)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "neither class folders with images"),
        (["top.jpg"], "neither class folders with images"),
        (["a/x.jpg", "a/x.png"], r"a/x\.jpg and a/x\.png have one key"),
    ],
)
def test_a_folder_that_cannot_be_used_is_one_line(tmp_path, names, message):
    fill(tmp_path, names)
    with pytest.raises(DataError, match=message) as error:
        list_source(tmp_path, 4)
    assert "\n" not in str(error.value)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match="nowhere: no such folder"):
        list_source(tmp_path / "nowhere", 4)


def test_tar_shards_give_their_samples_with_labels_in_order(tmp_path):
    contents = {}
    for shard, number in enumerate((3, 1, 5)):
        with webdataset.TarWriter(str(tmp_path / f"train-{shard}.tar")) as tar:
            for i in range(number):
                contents[f"train-{shard}/{i:03d}"] = picture(10 * shard + i)
                tar.write({"__key__": f"{i:03d}", "jpg": picture(10 * shard + i), "cls": 7 * shard + i})
    source = list_source(tmp_path, 2)
    assert (source.parts, source.images, source.num_classes) == (3, None, None)
    items = [item for part in range(3) for item in source.items(part)]
    assert {item.key: item.read() for item in items} == contents, "keys start anew in each tar, and stay apart"
    assert [item.label for item in items] == [0, 1, 2, 7, 14, 15, 16, 17, 18]


def test_samples_without_image_or_label_are_there_to_be_rejected(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as tar:
        tar.write({"__key__": "good", "jpg": picture(), "cls": 1})
        tar.write({"__key__": "blind", "cls": 2})
        tar.write({"__key__": "unknown", "png": picture()})
        tar.write({"__key__": "word", "jpg": picture(), "cls.txt": "x", "cls": b"cat"})
    items = {item.key: item for item in list_source(tmp_path, 2).items(0)}
    assert {key: item.label for key, item in items.items()} == {
        "a/good": 1,
        "a/blind": 2,
        "a/unknown": None,
        "a/word": None,
    }
    assert items["a/blind"].read() == b""


@pytest.mark.parametrize("keep", [0.3, 0.9])
def test_a_tar_that_was_cut_off_is_named(tmp_path, keep):
    path = tmp_path / "a.tar"
    with webdataset.TarWriter(str(path)) as tar:
        for i in range(5):
            tar.write({"__key__": str(i), "jpg": picture(i, 64), "cls": i})
    with tarfile.open(path) as tar:
        end = max(member.offset_data + member.size for member in tar)
    path.write_bytes(path.read_bytes()[: int(end * keep)])
    with pytest.raises(DataError, match=r"a\.tar: not a whole tar file"):
        list_source(tmp_path, 2).items(0)


@pytest.mark.parametrize("place", ["header", "middle of a header", "between members"])
def test_a_tar_damaged_at_a_header_is_not_taken_for_a_short_one(tmp_path, place):
    """The tarfile module ends there without a word, and images would be lost."""
    path = tmp_path / "a.tar"
    with webdataset.TarWriter(str(path)) as tar:
        for i in range(10):
            tar.write({"__key__": str(i), "jpg": picture(i), "cls": i})
    with tarfile.open(path) as tar:
        header = [member.offset for member in tar][8]
    content = bytearray(path.read_bytes())
    if place == "header":
        content[header + 100] ^= 0x55
    else:
        del content[header + (300 if "middle" in place else 0) :]
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.tar: not a whole tar file"):
        list_source(tmp_path, 2).items(0)


def test_a_class_folder_that_cannot_be_listed_is_an_error_and_hidden_ones_are_no_classes(tmp_path, monkeypatch):
    fill(tmp_path, ["a/1.jpg", "b/2.jpg", ".cache/3.jpg"])
    assert list_source(tmp_path, 4).classes == ["a", "b"]
    scandir = os.scandir

    def failing(path):
        if str(path).endswith("/b"):
            raise OSError(5, "Input/output error", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", failing)
    with pytest.raises(DataError, match="/b: cannot be listed: Input/output error"):
        list_source(tmp_path, 4)


def test_a_name_that_is_not_utf8_is_refused_before_any_work(tmp_path):
    fill(tmp_path, ["a/1.jpg"])
    (tmp_path / "a" / os.fsdecode(b"\xff.jpg")).write_bytes(picture())
    with pytest.raises(DataError, match="rename it"):
        list_source(tmp_path, 4)
