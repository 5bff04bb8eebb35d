"""Pixels from image files to batches: exactly the centre crops, exactly their mirror images, at the right positions."""

import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from data.batches.batch import MicroBatch, make_batch
from data.batches.loader import BatchDataset, GroupSampler, load_batches
from data.batches.plan import GroupsConfig, plan_epoch
from data.errors import DataError
from data.extraction.crop import center_crop
from data.extraction.sources import list_source
from data.extraction.verify import verify_store
from data.neighbors.graph import build_graph
from data.randomness import Draws, Purpose, draw
from data.sets.pixels import Pixels
from data.sets.registry import DataConfig, open_images
from data.stores.shards import agree_on_settings, finish, shard_names, write_shard
from data.stores.store import Store, read_manifest
from tests.stores import encoded, noise, pixels, stored, write

NUMBER = 40
PLAIN = GroupsConfig(variant="none", size=1)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Images of many sizes and kinds in three class folders; {key: path}."""
    root, rng = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
    found = {}
    for i in range(NUMBER):
        image = noise(i, *rng.integers(9, 90, size=2).tolist())
        name = f"c{i % 3}/{i:02d}"
        kind, image = [("jpg", image), ("png", image.convert("L")), ("jpg", image.convert("CMYK")), ("png", image)][
            i % 4
        ]
        found[name] = root / f"{name}.{kind}"
        write(found[name], encoded(image, {"jpg": "JPEG", "png": "PNG"}[kind]))
    return root, found


@pytest.fixture(scope="module")
def folder(files, tmp_path_factory):
    """Pixels of them at 16 a side, in /pixels, and a neighbour graph by their thumbnails, in /graph."""
    out = tmp_path_factory.mktemp("stores")
    assert pixels(files[0], out / "pixels")["images"] == NUMBER
    return add_graph(out)


def add_graph(out):
    store = Store(out / "pixels", read_manifest(out / "pixels", "pixels", ""))
    keys = [key.decode() for key in store.index["key"]]
    thumbnails = store.read("pixels", np.arange(len(keys)))[:, :, ::8, ::8].reshape(len(keys), -1) / 255 - 0.5
    feature = (thumbnails / np.linalg.norm(thumbnails, axis=1, keepdims=True)).astype(np.float16)
    agree_on_settings(out / "features", {"name": "thumbnails"})
    write_shard(out / "features/features-000000.tar", keys, [0] * len(keys), {"feature": feature}, [])
    finish(out / "features", "features", 1, 3, 0)
    build_graph(out / "features", out / "graph", 12, "exact", 1, "fp32", "cpu")
    return out


def crops(files, size=16):
    """{key: uint8 (3, size, size)} by hand."""
    opened = {key: Image.open(path).convert("RGB") for key, path in files.items()}
    return {key: center_crop(image, size).transpose(2, 0, 1) for key, image in opened.items()}


def opened(folder, flip=True, neighbors=None):
    return Pixels(str(folder / "pixels"), neighbors and str(neighbors), flip, {})


def as_read(crop):
    return torch.from_numpy(crop.copy()).float() / 127.5 - 1


@pytest.mark.parametrize(("size", "part_size", "workers"), [(16, 5, 0), (24, 64, 2), (1, 1, 0)])
def test_stored_pixels_are_the_centre_crops_of_the_files(files, tmp_path, size, part_size, workers):
    root, paths = files
    manifest = pixels(root, tmp_path / "out", image_size=size, part_size=part_size, workers=workers)
    assert manifest["fields"] == {"pixels": {"shape": [3, size, size], "dtype": "uint8"}}
    assert len(manifest["shards"]) == -(-NUMBER // part_size)
    found, expected = stored(tmp_path / "out", "pixels", "pixels"), crops(paths, size)
    assert found.keys() == expected.keys()
    for key, (label, crop) in found.items():
        np.testing.assert_array_equal(crop, expected[key])
        assert f"c{label}" == key.partition("/")[0]
    assert list(verify_store(tmp_path / "out", list_source(root, 9))) == []


def test_the_images_read_are_the_crops_and_the_mirrored_ones_their_mirror_images_exactly(files, folder):
    expected = crops(files[1])
    images = opened(folder)
    keys = [
        key.decode() for key in Store(folder / "pixels", read_manifest(folder / "pixels", "pixels", "")).index["key"]
    ]
    rng = np.random.default_rng(0)
    for start in (0, 10**9):
        numbers = rng.integers(NUMBER, size=200)
        drawn = draw(3, Purpose.TRAINING, np.arange(start, start + 200), images.shape, 1, 4, mirrored=True)
        assert 60 < drawn.flip.sum() < 140
        x, plain = images.read(numbers, drawn), opened(folder, flip=False).read(numbers, drawn)
        assert x.dtype == torch.float32 and x.shape == (200, 3, 16, 16)
        for i, number in enumerate(numbers):
            crop = expected[keys[number]]
            assert torch.equal(x[i], as_read(crop[..., ::-1] if drawn.flip[i] else crop))
            assert torch.equal(plain[i], as_read(crop))
            assert (((x[i] + 1) * 127.5).round().byte().numpy() == (crop[..., ::-1] if drawn.flip[i] else crop)).all()
        assert torch.equal(images.read(numbers, replace(drawn, flip=~drawn.flip)), x.flip(3)), "and back again"


@pytest.mark.parametrize("group_size", [1, 4])
def test_a_batch_is_made_of_the_draws_of_its_positions(folder, group_size):
    images = opened(folder)
    numbers = np.random.default_rng(1).permutation(NUMBER)
    config = GroupsConfig(size=4) if group_size == 4 else PLAIN
    batch = make_batch(images, config, 4, 7, MicroBatch(1000, numbers, group_size == 4))
    drawn = draw(7, Purpose.TRAINING, np.arange(1000, 1000 + NUMBER), images.shape, group_size, 4, mirrored=True)
    assert drawn.posterior is None
    assert torch.equal(batch.x, images.read(numbers, drawn))
    np.testing.assert_array_equal(batch.noise, drawn.noise)
    np.testing.assert_array_equal(batch.slot, drawn.slot)
    np.testing.assert_array_equal(batch.label, images.label[numbers])
    still = make_batch(opened(folder, flip=False), config, 4, 7, MicroBatch(1000, numbers, group_size == 4))
    for name in ("noise", "u", "slot", "conditional"):
        assert torch.equal(getattr(batch, name), getattr(still, name)), "flip changes the images alone"
    assert not torch.equal(batch.x, still.x)


def by_position(folder, world_size, micro, workers):
    """What every position of the stream is over three epochs."""
    images = opened(folder, neighbors=folder / "graph")
    config = GroupsConfig(variant="light", size=4, share=0.5, mixing="within_step", threshold=0.1, neighbors=12)
    graph, found = images.neighbors(12), {}
    for rank in range(world_size):
        sampler = GroupSampler(
            lambda epoch: plan_epoch(config, images.label, graph, 32, 7, epoch), 1, 0, 3, rank, world_size, micro
        )
        for made, places in zip(
            load_batches(BatchDataset(images, config, 16, 7), sampler, workers), sampler, strict=True
        ):
            for one, where in zip(made, places, strict=True):
                for i, image in enumerate(where.images.tolist()):
                    values = [one.x[i], one.noise[i], one.u[i], one.label[i], one.slot[i], one.conditional[i]]
                    found[where.position + i] = (image, *[value.numpy().tobytes() for value in values])
    return found


def test_an_image_of_the_stream_is_the_same_for_any_ranks_micro_batches_and_workers(folder):
    expected = by_position(folder, 1, None, 0)
    assert sorted(expected) == list(range(3 * 32))
    for world_size, micro, workers in ((2, None, 0), (4, 4, 0), (2, 4, 2)):
        assert by_position(folder, world_size, micro, workers) == expected


def test_pixels_go_with_the_graph_of_the_same_images_alone(files, folder, tmp_path):
    assert opened(folder, neighbors=folder / "graph").max_neighbors() == 12
    fewer = shutil.copytree(files[0], tmp_path / "files")
    (fewer / "c0/00.jpg").unlink()
    pixels(fewer, tmp_path / "pixels")
    add_graph(tmp_path)
    with pytest.raises(
        DataError, match=r"^data\.neighbors=.*other images \(39, .* data\.pixels=.* \(40, .*same$"
    ) as error:
        opened(folder, neighbors=tmp_path / "graph").max_neighbors()
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match=r"data\.neighbors=null.*build_neighbors"):
        opened(folder).max_neighbors()


def test_images_of_other_crops_or_keys_are_other_images(files, folder, tmp_path):
    pixels(files[0], tmp_path / "pixels", image_size=8)
    names = {opened(folder).identity, opened(tmp_path).identity}
    again = tmp_path / "again"
    pixels(files[0], again / "pixels", part_size=11)
    assert len(names) == 2 and opened(again).identity == opened(folder).identity, "however they are cut into shards"


@pytest.mark.parametrize(("setting", "found"), [({"channels": 4}, "channels=3"), ({"side": 32}, "side=16")])
def test_what_the_config_says_of_pixels_must_be_true_of_them(folder, setting, found):
    ((name, value),) = setting.items()
    base = {"name": "pixels", "pixels": str(folder / "pixels")}
    said = rf"^data\.{name}={value}: the pixels in .*; set data\.{found} or give other pixels$"
    with pytest.raises(DataError, match=said):
        open_images(DataConfig(**base, **setting))
    images = open_images(DataConfig(**base, channels=3, side=16))
    assert len(images) == NUMBER and images.shape == (3, 16, 16) and images.vae is None and images.num_classes == 3


def test_what_are_no_pixels_is_refused_in_one_line(folder, tmp_path):
    for path, said in (
        (
            tmp_path / "nothing",
            r"no manifest\.json in it, so not \(yet\) complete; make it with tools/precompute_pixels",
        ),
        (folder / "features", "holds features, not pixels"),
        (folder / "graph", "holds neighbors, not pixels"),
    ):
        with pytest.raises(DataError, match=rf"^{re.escape(str(path))}: .*{said}"):
            open_images(DataConfig(name="pixels", pixels=str(path)))
    with pytest.raises(DataError, match=r"data\.name=pixels: has no held-out images"):
        open_images(DataConfig(name="pixels", pixels=str(folder / "pixels")), "heldout")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"name": "pixels"}, "pixels=null: name=pixels needs a folder made by tools/precompute_pixels.py"),
        ({"name": "latents"}, "latents=null: name=latents needs a folder made by tools/precompute_latents.py"),
        ({"name": "pixels", "pixels": "x", "scaling": 0.5}, "scaling=0.5: is for name=latents; "),
        ({"name": "pixels", "pixels": "x", "vae": "y"}, "vae=y: is for name=latents; "),
        ({"name": "pixels", "pixels": "x", "latents": "y"}, "latents=y: is for name=latents; "),
        ({"name": "pixels", "pixels": "x", "streaming": True}, "streaming=True: is for name=latents; "),
        ({"name": "latents", "latents": "x", "pixels": "y"}, "pixels=y: is for name=pixels; "),
        ({"pixels": "y"}, "pixels=y: is for name=pixels; "),
        ({"neighbors": "y"}, "neighbors=y: is for name=latents or pixels; "),
        ({"channels": 3}, "channels=3: is for name=latents or pixels; "),
        ({"side": 3}, "side=3: is for name=latents or pixels; "),
    ],
)
def test_a_field_of_another_kind_of_images_is_named(settings, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        DataConfig(**settings)


def test_another_size_in_the_same_folder_is_refused(files, folder):
    with pytest.raises(DataError, match=r"^size=24: .* was begun with size=16; set it back, or give another --out$"):
        pixels(files[0], folder / "pixels", image_size=24)


def test_a_store_is_cut_in_two_by_keys_for_a_small_classifier(tmp_path, monkeypatch):
    images = Pixels(str(make_halved(tmp_path, 400)), None, True, {})
    train, heldout = images.halves()
    assert len(train) + len(heldout) == 400 and 40 < len(heldout) < 120
    every = np.concatenate([train.x, heldout.x]).reshape(400, -1)
    whole = images.read(np.arange(400), Draws(np.empty(0), np.empty(0), np.empty(0), flip=np.zeros(400, bool)))
    assert {row.tobytes() for row in every} == {row.tobytes() for row in whole.numpy().reshape(400, -1)}
    again = Pixels(str(tmp_path / "pixels"), None, False, {}).halves()
    assert all(
        np.array_equal(a.x, b.x) and np.array_equal(a.label, b.label)
        for a, b in zip(again, (train, heldout), strict=True)
    )
    monkeypatch.setattr("data.sets.pixels.MOST_IN_MEMORY", 100)
    assert sum(len(part) for part in images.halves()) == 100


def test_a_store_with_too_few_images_of_a_class_cannot_be_cut(tmp_path):
    images = Pixels(str(make_halved(tmp_path, 6)), None, False, {})
    with pytest.raises(DataError, match=r"^data\.pixels=.*: too few images of class \d to keep a fifth of them"):
        images.halves()


def make_halved(folder, number):
    """A store of random pixels of three classes."""
    rng = np.random.default_rng(number)
    label = (np.arange(number) % 3).tolist()
    agree_on_settings(folder / "pixels", {"size": 4})
    for path, part in zip(shard_names("pixels", 2), np.array_split(np.arange(number), 2), strict=True):
        pixels = rng.integers(256, size=(len(part), 3, 4, 4), dtype=np.uint8)
        write_shard(
            folder / "pixels" / path, [f"{i:05d}" for i in part], [label[i] for i in part], {"pixels": pixels}, []
        )
    finish(folder / "pixels", "pixels", 2, 3, 0)
    return folder / "pixels"
