"""Further fields of a store: read with the images by number and from a stream, and mirrored as they declare."""

import numpy as np
import pytest
import torch

from data.batches.batch import MicroBatch, make_batch
from data.batches.plan import GroupsConfig
from data.errors import DataError
from data.neighbors.clusters import cluster_latents
from data.randomness import Purpose, draw
from data.sets.registry import DataConfig, open_images
from data.sets.streamed_latents import StreamedLatents
from data.stores.shards import agree_on_settings, finish, shard_names, write_shard

NUMBER, PLAIN = 48, GroupsConfig(variant="none", size=1)
MIRROR = {"patches": "both", "map": "width"}
NAMES = ("patches", "map", "caption")


def store(folder, mirror=MIRROR, kind="latents"):
    """Write images in three shards, with fields of each kind; their arrays."""
    rng = np.random.default_rng(0)
    main = {
        "latents": {"moments": rng.normal(size=(NUMBER, 2, 4, 3, 3)).astype(np.float32)},
        "pixels": {"pixels": rng.integers(256, size=(NUMBER, 3, 4, 4), dtype=np.uint8)},
        "features": {"feature": rng.normal(size=(NUMBER, 8)).astype(np.float16)},
    }[kind]
    further = {
        "patches": rng.normal(size=(NUMBER, 2, 4, 6)).astype(np.float16),
        "map": rng.normal(size=(NUMBER, 2, 3)).astype(np.float32),
        "caption": rng.normal(size=(NUMBER, 5)).astype(np.float32),
    }
    arrays = main | (further if kind != "features" else {})
    agree_on_settings(folder, {"name": "none", "scaling_factor": 1.0, "shift_factor": 0.0, "mirror": mirror})
    for part, name in zip(np.split(np.arange(NUMBER), 3), shard_names(kind, 3), strict=True):
        shard = {field: array[part] for field, array in arrays.items()}
        write_shard(folder / name, [f"{i:03d}" for i in part], (part % 4).tolist(), shard, [])
    finish(folder, kind, 3, 4, 0)
    return further


def expected(further, numbers, flip):
    """The fields of some images, and of the mirror image of those that are flipped, one by one."""
    rows = [
        (further["patches"][n, int(f)], further["map"][n, :, ::-1] if f else further["map"][n], further["caption"][n])
        for n, f in zip(numbers, flip, strict=True)
    ]
    return {name: np.stack(column) for name, column in zip(NAMES, zip(*rows, strict=True), strict=True)}


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("kind", ["latents", "pixels"])
def test_a_batch_has_the_fields_that_are_asked_for_mirrored_with_their_images(tmp_path, kind, flip):
    further = store(tmp_path, kind=kind)
    images = open_images(DataConfig.model_validate({"name": kind, kind: str(tmp_path), "flip": flip}))
    assert images.extra == {"patches": (4, 6), "map": (2, 3), "caption": (5,)}
    numbers = np.random.default_rng(1).permutation(NUMBER)
    batch = make_batch(images.pool(), PLAIN, 4, 7, MicroBatch(100, numbers, False), extra=NAMES)
    drawn = draw(7, Purpose.TRAINING, np.arange(100, 100 + NUMBER), images.shape, 1, 4, kind == "latents", True)
    assert batch.extra.keys() == set(NAMES) and 0 < drawn.flip.sum() < NUMBER
    for name, array in expected(further, numbers, drawn.flip & flip).items():
        np.testing.assert_array_equal(batch.extra[name], array)
    alone = make_batch(images.pool(), PLAIN, 4, 7, MicroBatch(100, numbers, False), extra=("map",))
    assert alone.extra.keys() == {"map"} and torch.equal(alone.x, batch.x)


@pytest.mark.parametrize("flip", [True, False])
def test_clusters_keep_the_fields_and_a_stream_reads_them(tmp_path, flip):
    further = store(tmp_path / "latents")
    store(tmp_path / "features", kind="features")
    cluster_latents(tmp_path / "latents", tmp_path / "features", tmp_path / "out", 16)
    order = np.load(tmp_path / "out/order.npy")
    images = StreamedLatents(str(tmp_path / "out"), None, flip, {})
    pool, numbers = images.read_shards((0, 1), NAMES), np.arange(5)
    drawn = draw(3, Purpose.TRAINING, np.arange(32), images.shape, 1, 4, True, True)
    for name, array in expected(further, order[:32], drawn.flip & flip).items():
        np.testing.assert_array_equal(pool.read_extra(np.arange(32), drawn, NAMES)[name], array)
    kept = pool.keep(numbers, images.read_shards((2,), NAMES))
    for name in NAMES:
        np.testing.assert_array_equal(kept.further[name][:5], pool.further[name][:5])
        assert len(kept.further[name]) == 5 + 16


@pytest.mark.parametrize(
    "mirror, said", [({"caption": "both"}, "both for caption, which is (5,)"), ({"map": "left"}, "mirror=left for map")]
)
def test_a_field_that_is_not_as_it_declares_is_refused_when_the_store_is_opened(tmp_path, mirror, said):
    store(tmp_path, mirror)
    for streaming in (False, True):
        with pytest.raises(DataError) as error:
            open_images(DataConfig(name="latents", latents=str(tmp_path), streaming=streaming))
        assert said in str(error.value) and "\n" not in str(error.value)
