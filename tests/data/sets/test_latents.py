"""Latents drawn from the posteriors of a store: their distribution, mirror images, and that they belong to a position
of the stream."""

import re
import shutil

import numpy as np
import pytest
import torch

from data.batches.batch import MicroBatch, make_batch
from data.batches.loader import BatchDataset, GroupSampler, load_batches
from data.batches.plan import GroupsConfig, plan_epoch
from data.errors import DataError
from data.randomness import Purpose, draw
from data.sets.latents import Latents
from data.sets.registry import DataConfig, open_images
from data.sets.streamed_latents import StreamedLatents
from data.stores.shards import agree_on_settings, finish, shard_names, write_shard
from data.stores.store import Store, read_manifest

ANY = {"channels": None, "side": None, "scaling": None}
PLAIN = GroupsConfig(variant="none", size=1)


@pytest.fixture(scope="module")
def folder(make_latents, tmp_path_factory):
    """96 images in three shards, scaling 0.5, shift 0.25."""
    return make_latents(tmp_path_factory.mktemp("latents"))


def write_latents(folder, moments, shards=2, scaling=0.7, shift=-1.5):
    """A store of these moments (n, 2, 2C, h, w)."""
    agree_on_settings(folder, {"name": "no/vae", "scaling_factor": scaling, "shift_factor": shift})
    for path, part in zip(shard_names("latents", shards), np.array_split(np.arange(len(moments)), shards), strict=True):
        write_shard(folder / path, [f"{i:05d}" for i in part], [0] * len(part), {"moments": moments[part]}, [])
    finish(folder, "latents", shards, 1, 0)
    return folder


def opened(folder, flip=True, neighbors=None):
    return Latents(str(folder), neighbors and str(neighbors), None, flip, ANY)


def moments_of(folder):
    manifest = read_manifest(folder, "latents", "")
    return Store(folder, manifest).read("moments", np.arange(manifest["images"])).astype(np.float64)


def drawn_at(images, number, positions, seed=0):
    """One image as it is read at many positions of the stream; the batch's own noise and its timesteps there."""
    micro = MicroBatch(positions, np.full(4000, number), False)
    batch = make_batch(images, PLAIN, 4, seed, micro)
    return tuple(array.double().numpy() for array in (batch.x, batch.noise, batch.u))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("start", [0, 10**9])
def test_samples_of_a_posterior_have_its_mean_and_deviation_scaled_and_shifted(dtype, start, tmp_path):
    rng = np.random.default_rng(start)
    moments = rng.normal(size=(6, 2, 6, 3, 5)).astype(dtype)
    images = opened(write_latents(tmp_path / "latents", moments), flip=False)
    mean, logvar = np.split(moments[:, 0].astype(np.float64), 2, axis=1)
    for number in (0, 5):
        x, noise, t = drawn_at(images, number, start)
        expected, deviation = (mean[number] + 1.5) * 0.7, np.exp(logvar[number] / 2) * 0.7
        score = (x - expected) / deviation
        assert abs(score.mean(axis=0)).max() < 5 / 4000**0.5
        assert abs(score.std(axis=0) - 1).max() < 5 / 8000**0.5
        assert abs((score**4).mean(axis=0) - 3).max() < 5 * (96 / 4000) ** 0.5, "it is normal"
        assert abs((score * noise).mean(axis=0)).max() < 5 / 4000**0.5, "and not the noise that is added to it"
        assert abs((score.T * (t - 0.5)).mean(axis=-1)).max() < 5 * (1 / 12 / 4000) ** 0.5
        flat = score.reshape(4000, -1)
        between = np.corrcoef(flat.T) - np.eye(flat.shape[1])
        assert abs(between).max() < 5.5 / 4000**0.5, "each number is drawn for itself"


@pytest.mark.parametrize("seed", range(3))
def test_half_of_the_images_come_from_the_moments_of_the_mirror_image_and_none_without_flip(seed, tmp_path):
    """Deviations of nearly 0, so that every number tells which of the two it is of."""
    moments = np.random.default_rng(seed).normal(size=(4, 2, 4, 2, 2))
    moments[:, :, 2:] = -30
    folder = write_latents(tmp_path / "latents", moments.astype(np.float16), scaling=1.0, shift=0.0)
    mean = moments.astype(np.float16).astype(np.float64)[:, :, :2]
    for number in range(4):
        x, noise, t = drawn_at(opened(folder), number, 7, seed)
        mirrored = abs(x - mean[number, 1]).max(axis=(1, 2, 3)) < 1e-4
        assert (mirrored ^ (abs(x - mean[number, 0]).max(axis=(1, 2, 3)) < 1e-4)).all()
        assert abs(mirrored.sum() - 2000) < 5 * 1000**0.5
        assert abs((mirrored[1:] == mirrored[:-1]).sum() - 2000) < 5 * 1000**0.5
        assert abs(noise[mirrored].mean(axis=0)).max() < 5 / 1900**0.5
        assert abs(t[mirrored].mean() - 0.5) < 5 * (1 / 12 / 1900) ** 0.5
        x, _, _ = drawn_at(opened(folder, flip=False), number, 7, seed)
        assert abs(x - mean[number, 0]).max() < 1e-4


def test_a_latent_is_the_moments_of_its_entry_and_the_noise_of_its_position(folder):
    """By hand, in float64, image by image."""
    moments = moments_of(folder / "latents")
    images = opened(folder / "latents")
    numbers = np.random.default_rng(0).permutation(96)[:40]
    micro = MicroBatch(1000, numbers, True)
    batch = make_batch(images, GroupsConfig(size=4), 4, 3, micro)
    drawn = draw(3, Purpose.TRAINING, np.arange(1000, 1040), (2, 4, 4), 4, 4, posterior=True, mirrored=True)
    for i, number in enumerate(numbers):
        mean, logvar = np.split(moments[number, int(drawn.flip[i])], 2)
        expected = (mean + np.exp(logvar / 2) * drawn.posterior[i] - 0.25) * 0.5
        np.testing.assert_allclose(batch.x[i], expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(batch.noise, drawn.noise)
    np.testing.assert_array_equal(batch.label, images.label[numbers])
    assert batch.x.dtype == torch.float32


SETTINGS = [
    {"variant": "none", "size": 1},
    {"variant": "light", "size": 4, "share": 0.5, "mixing": "within_step", "threshold": 0.6},
    {"variant": "full", "size": 2, "query": "class"},
]


def by_position(folder, settings, world_size, micro, workers, flip=True):
    """What every position of the stream is over three epochs, all in bytes."""
    images = opened(folder / "latents", flip, folder / "graph")
    config = GroupsConfig(neighbors=12, **settings)
    graph = images.neighbors(12) if settings.get("query", "similarity") == "similarity" else None
    batch, steps = 32, 3
    found = {}
    for rank in range(world_size):
        sampler = GroupSampler(
            lambda epoch: plan_epoch(config, images.label, graph, batch, 7, epoch), steps, 0, 9, rank, world_size, micro
        )
        batches = load_batches(BatchDataset(images, config, 16, 7), sampler, workers)
        for made, places in zip(batches, sampler, strict=True):
            for one, where in zip(made, places, strict=True):
                for i, image in enumerate(where.images.tolist()):
                    values = [one.x[i], one.noise[i], one.u[i], one.label[i], one.slot[i], one.conditional[i]]
                    found[where.position + i] = (image, *[value.numpy().tobytes() for value in values])
    return found


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_latent_of_the_stream_is_the_same_for_any_ranks_micro_batches_and_workers(folder, settings):
    expected = by_position(folder, settings, 1, None, 0)
    assert sorted(expected) == list(range(9 * 32))
    for world_size, micro, workers in ((2, None, 0), (4, 4, 0), (1, 8, 2), (2, 4, 2)):
        assert by_position(folder, settings, world_size, micro, workers) == expected
    assert by_position(folder, settings, 1, None, 0, flip=False) != expected


@pytest.mark.parametrize("threshold", [0.8, 0.95])
def test_fallbacks_over_all_ranks_and_micro_batches_of_a_step_are_those_of_the_plan(folder, threshold):
    images = opened(folder / "latents", neighbors=folder / "graph")
    config = GroupsConfig(variant="full", size=4, neighbors=12, threshold=threshold)
    plans = [plan_epoch(config, images.label, images.neighbors(12), 32, 7, epoch) for epoch in range(3)]
    graph, total = images.neighbors(12), 0
    for world_size, micro in ((1, None), (2, None), (2, 8), (1, 4), (4, 4)):
        samplers = [GroupSampler(plans.__getitem__, 3, 0, 9, rank, world_size, micro) for rank in range(world_size)]
        for step, dealt in enumerate(zip(*samplers, strict=True)):
            plan, row = plans[step // 3], step % 3
            first, last = plan.grouped[:row].sum() // 4, plan.grouped[: row + 1].sum() // 4
            assert sum(m.fallbacks for rank in dealt for m in rank) == plan.fallback[first:last].sum()
            for m in (m for rank in dealt for m in rank):
                groups = m.images.reshape(-1, 4) if m.in_groups else np.empty((0, 4), int)
                near = [np.isin(g[1:], graph.ids[g[0]][graph.similarities[g[0]] >= threshold]).all() for g in groups]
                assert m.fallbacks >= len(groups) - sum(near)
                total += m.fallbacks
    assert total


def test_other_seeds_and_other_positions_draw_other_latents_of_an_image(folder):
    images = opened(folder / "latents")
    micro = [MicroBatch(position, np.arange(96), False) for position in (0, 96)]
    first, other, later = (
        make_batch(images, PLAIN, 4, seed, m).x for seed, m in ((0, micro[0]), (1, micro[0]), (0, micro[1]))
    )
    assert (first != other).all() and (first != later).all()
    assert torch.equal(first, make_batch(opened(folder / "latents"), PLAIN, 4, 0, micro[0]).x)


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_streamed_and_read_at_random_an_image_is_the_same_with_the_same_draws(flip, dtype, tmp_path):
    moments = np.random.default_rng(0).normal(size=(50, 2, 6, 3, 3)).astype(dtype)
    folder = write_latents(tmp_path / "latents", moments, shards=4)
    random, streamed = opened(folder, flip), StreamedLatents(str(folder), None, flip, ANY)
    first = np.cumsum([0, *streamed.counts])
    for shards in ((0,), (3, 1), (2, 0, 1, 3)):
        pool = streamed.read_shards(shards)
        numbers = np.concatenate([np.arange(first[shard], first[shard + 1]) for shard in shards])
        assert len(pool.label) == len(numbers) and pool.features is None
        order = np.random.default_rng(1).permutation(len(numbers))
        drawn = draw(5, Purpose.TRAINING, np.arange(len(numbers)) + 11, (3, 3, 3), 1, 4, posterior=True, mirrored=True)
        assert torch.equal(pool.read(order, drawn), random.read(numbers[order], drawn))
    assert random.shape == streamed.shape == (3, 3, 3) and len(random) == len(streamed) == 50


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_any_images_of_a_store_are_read_in_any_order_with_any_entries(dtype, tmp_path):
    rng = np.random.default_rng(0)
    moments = rng.normal(size=(41, 2, 4, 3, 5)).astype(dtype)
    folder = write_latents(tmp_path / "latents", moments, shards=5)
    store = Store(folder, read_manifest(folder, "latents", ""))
    assert len(store) == 41
    for number in (1, 7, 41, 200):
        chosen, entry = rng.integers(41, size=number), rng.integers(2, size=number)
        np.testing.assert_array_equal(store.read("moments", chosen), moments[chosen])
        np.testing.assert_array_equal(store.read("moments", chosen, entry), moments[chosen, entry])
        np.testing.assert_array_equal(store.read("moments", chosen, entry == 1), moments[chosen, entry])
        assert store.read("moments", chosen).dtype == dtype


@pytest.mark.parametrize(
    ("setting", "found"),
    [({"channels": 4}, "channels=2"), ({"side": 32}, "side=4"), ({"scaling": 0.18215}, "scaling=0.5")],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_what_the_config_says_of_latents_must_be_true_of_them(folder, setting, found, streaming):
    ((name, value),) = setting.items()
    base = {"name": "latents", "latents": str(folder / "latents"), "streaming": streaming}
    with pytest.raises(DataError, match=rf"^data\.{name}={value}: .*; set data\.{found} or") as error:
        open_images(DataConfig(**base, **setting))
    assert "\n" not in str(error.value)
    right = {"channels": 2, "side": 4, "scaling": 0.5}
    assert len(open_images(DataConfig(**base, **right))) == len(open_images(DataConfig(**base))) == 96


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_without_manifest_or_of_features_is_not_taken_for_latents(folder, streaming, tmp_path):
    shutil.copytree(folder / "latents", tmp_path / "begun")
    (tmp_path / "begun/manifest.json").unlink()
    for path, said in (
        (tmp_path / "begun", r"no manifest\.json in it, so not \(yet\) complete; make it with tools/precompute_lat"),
        (tmp_path / "nothing", r"no manifest\.json in it"),
        (folder / "features", "holds features, not latents"),
        (folder / "graph", "holds neighbors, not latents"),
    ):
        with pytest.raises(DataError, match=rf"^{re.escape(str(path))}: .*{said}"):
            open_images(DataConfig(name="latents", latents=str(path), streaming=streaming))


def test_a_graph_of_other_images_is_refused_and_one_of_the_same_is_memory_mapped(folder, make_latents, tmp_path):
    other = make_latents(tmp_path, number=95)
    for graph, said in (
        (other / "graph", r"other images \(95, keys .* than .* \(96, keys .*\)"),
        (folder / "latents", "holds latents, not neighbors"),
        (tmp_path / "nothing", r"no manifest\.json"),
    ):
        with pytest.raises(DataError, match=said):
            opened(folder / "latents", neighbors=graph).max_neighbors()
    with pytest.raises(DataError, match=r"data\.neighbors=null.*build_neighbors"):
        opened(folder / "latents").max_neighbors()
    images = opened(folder / "latents", neighbors=folder / "graph")
    assert images.max_neighbors() == 12
    graph = images.neighbors(5)
    assert graph.ids.shape == graph.similarities.shape == (96, 5) and isinstance(graph.ids, np.memmap)
    np.testing.assert_array_equal(graph.ids, images.neighbors(12).ids[:, :5])


def test_latents_have_no_held_out_images_and_other_settings_are_for_latents_alone(folder):
    with pytest.raises(DataError, match=r"data\.name=latents: has no held-out images"):
        open_images(DataConfig(name="latents", latents=str(folder / "latents")), "heldout")
    for wrong in ({"latents": "x"}, {"neighbors": "x"}, {"vae": "x"}, {"streaming": True}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            DataConfig(**wrong)
    with pytest.raises(ValueError, match="latents=null"):
        DataConfig(name="latents")
