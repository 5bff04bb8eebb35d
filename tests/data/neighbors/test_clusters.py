"""Shards of similar images: their sizes, what stands in them, many processes, killed and started again."""

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import DataError
from data.extraction.verify import verify_store
from data.neighbors.clusters import StoredKeys, balanced_clusters, cluster_latents, shard_sizes
from data.neighbors.exact import nearest_neighbors
from data.sets.streamed_latents import StreamedLatents
from data.stores.store import Store, read_manifest
from tests.patience import PATIENCE


@pytest.fixture(scope="module")
def folder(make_latents, tmp_path_factory):
    """500 images."""
    return make_latents(tmp_path_factory.mktemp("clusters"), number=500)


def cluster(folder, out, shard_size=64, **processes):
    return cluster_latents(folder / "latents", folder / "features", out, shard_size, **processes)


def by_key(store, *fields):
    """(label, an array per field) of each image."""
    arrays = [store.read(field, np.arange(len(store))) for field in fields]
    rows = zip(store.index["key"].tolist(), store.index["label"].tolist(), *arrays, strict=True)
    return {row[0]: row[1:] for row in rows}


def tar_bytes(folder):
    return {path.name: path.read_bytes() for path in [*folder.glob("*.tar"), folder / "index.npy"]}


def tool(monkeypatch, *arguments):
    """What tools/cluster_latents.py exits with."""
    monkeypatch.syspath_prepend("tools")
    monkeypatch.setattr(sys, "argv", ["cluster_latents.py", *map(str, arguments)])
    try:
        runpy.run_path("tools/cluster_latents.py", run_name="__main__")
    except SystemExit as end:
        return end.code
    return 0


@given(st.integers(1, 5000), st.integers(1, 3000))
@settings(max_examples=300, deadline=None)
def test_shard_sizes_are_about_as_asked_for_in_whole_units_and_none_is_empty(images, shard_size):
    sizes = shard_sizes(images, shard_size)
    assert sum(sizes) == images
    assert all(size > 0 for size in sizes)
    assert all(size % 16 == 0 for size in sizes[:-1])
    assert sizes[-1] % 16 == images % 16
    assert max(sizes) - min(sizes) < 32, "all nearly the same"
    if shard_size >= 16 and images >= shard_size:
        assert max(sizes[:-1], default=0) <= 1.5 * shard_size + 16
        assert abs(len(sizes) - images / shard_size) < 1


@given(st.integers(0, 2**32), st.integers(1, 400), st.integers(1, 9), st.sampled_from(["scattered", "copies", "zeros"]))
@settings(max_examples=80, deadline=None)
def test_balanced_clusters_hold_every_image_once_whatever_the_sizes(seed, number, parts, kind):
    rng = np.random.default_rng(seed)
    cuts = np.sort(rng.integers(0, number, size=min(parts, number) - 1))
    sizes = [int(size) for size in np.diff([0, *cuts, number]) if size]
    features = {"scattered": rng.normal(size=(number, 5)), "copies": np.tile(rng.normal(size=5), (number, 1))}
    features = features.get(kind, np.zeros((number, 5))).astype(np.float16)
    order = balanced_clusters(features, sizes)
    assert sorted(order) == list(range(number))
    np.testing.assert_array_equal(order, balanced_clusters(features, sizes))


@pytest.mark.parametrize("seed", range(3))
def test_kinds_of_images_that_fit_shards_come_whole(seed):
    """Eight clusters far apart, of 32 images each, in eight shards of 32: each shard is one cluster."""
    rng = np.random.default_rng(seed)
    kind = rng.permutation(np.repeat(np.arange(8), 32))
    features = 10 * np.eye(8)[kind] + 0.1 * rng.normal(size=(256, 8))
    order = balanced_clusters(features.astype(np.float16), [32] * 8)
    purity = [np.bincount(kind[part]).max() / 32 for part in np.split(order, 8)]
    assert np.mean(purity) > 0.9


@pytest.mark.parametrize("seed", range(3))
def test_neighbors_share_a_shard_far_more_often_than_in_random_shards(seed):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(40, 16))[rng.integers(40, size=1600)]
    features = (centres + 0.3 * rng.normal(size=(1600, 16))).astype(np.float16)
    sizes = shard_sizes(1600, 100)
    shard = np.empty(1600, int)
    shard[balanced_clusters(features, sizes)] = np.repeat(np.arange(len(sizes)), sizes)
    ids = nearest_neighbors(features, 8).ids
    together = (shard[ids] == shard[:, None]).mean()
    at_random = (rng.permutation(shard)[ids] == rng.permutation(shard)[:, None]).mean()
    assert at_random < 0.1 and together > 0.6


def test_every_image_keeps_its_moments_feature_label_and_key(folder, tmp_path):
    manifest = cluster(folder, tmp_path / "out")
    out = Store(tmp_path / "out", read_manifest(tmp_path / "out", "latents", ""))
    assert out.manifest == manifest and manifest["images"] == 500 and manifest["num_classes"] == 3
    assert [shard["images"] for shard in manifest["shards"]] == shard_sizes(500, 64)
    latents, features = (
        by_key(Store(folder / kind, read_manifest(folder / kind, kind, "")), field)
        for kind, field in (("latents", "moments"), ("features", "feature"))
    )
    found = by_key(out, "moments", "feature")
    assert found.keys() == latents.keys() and len(found) == 500
    for key, (label, moments, feature) in found.items():
        assert label == latents[key][0] == features[key][0]
        np.testing.assert_array_equal(moments, latents[key][1])
        np.testing.assert_array_equal(feature, features[key][1])
        assert moments.dtype == latents[key][1].dtype and feature.dtype == np.float16
    settings = manifest["settings"]
    assert settings["scaling_factor"] == 0.5 and settings["shift_factor"] == 0.25 and settings["name"] == "no/vae"
    assert settings["encoder_weights"] == "0"
    streamed = StreamedLatents(str(tmp_path / "out"), None, False, {})
    pool = streamed.read_shards(tuple(range(len(streamed.counts))))
    np.testing.assert_array_equal(pool.label, out.index["label"])
    np.testing.assert_array_equal(pool.moments, out.read("moments", np.arange(500)))
    np.testing.assert_array_equal(pool.features, out.read("feature", np.arange(500)))


SLOWLY = """
import sys, time
from pathlib import Path
import data.neighbors.clusters

write = data.neighbors.clusters.write_shard
data.neighbors.clusters.write_shard = lambda *arguments: time.sleep(float(sys.argv[5])) or write(*arguments)
folder, out, process, processes = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
data.neighbors.clusters.cluster_latents(folder / "latents", folder / "features", out, 20, process, processes)
"""


def start(folder, out, processes, pause):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    commands = [[sys.executable, "-c", SLOWLY, folder, out, i, processes, pause] for i in range(processes)]
    return [
        subprocess.Popen([str(word) for word in command], env=env, stderr=subprocess.PIPE, text=True)
        for command in commands
    ]


def test_killed_and_shared_by_other_numbers_of_processes_the_shards_are_the_same(folder, tmp_path):
    cluster(folder, tmp_path / "whole", shard_size=20)
    out = tmp_path / "out"
    for processes, ready in ((2, 4), (1, 9)):
        running = start(folder, out, processes, 0.15)
        end = time.monotonic() + PATIENCE
        while len(list(out.glob("*.tar"))) < ready:
            assert time.monotonic() < end and all(process.poll() is None for process in running)
            time.sleep(0.005)
        for process in running:
            process.send_signal(signal.SIGKILL)
            process.communicate()
        assert not (out / "manifest.json").exists()
        assert len(list(out.glob("*.tar"))) < 25
        with pytest.raises(DataError, match=r"no manifest\.json"):
            StreamedLatents(str(out), None, False, {})
    for process in start(folder, out, 3, 0):
        _, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, errors
    assert tar_bytes(out) == tar_bytes(tmp_path / "whole")
    store = Store(folder / "latents", read_manifest(folder / "latents", "latents", ""))
    assert list(verify_store(out, StoredKeys(store))) == []


def test_the_tool_makes_the_shards_verifies_them_and_finds_a_flipped_byte(folder, monkeypatch, capsys, tmp_path):
    out = tmp_path / "out"
    arguments = ["--latents", folder / "latents", "--features", folder / "features", "--out", out, "--shard-size", 100]
    assert tool(monkeypatch, *arguments, "--verify") == 1
    assert "not complete" in capsys.readouterr().out
    assert tool(monkeypatch, *arguments, "--procs", 1) == 0
    assert "complete, 500 images" in capsys.readouterr().out
    assert tool(monkeypatch, *arguments, "--verify") == 0
    assert "verified: every image once" in capsys.readouterr().out
    shard = sorted(out.glob("*.tar"))[2]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert tool(monkeypatch, *arguments, "--verify") == 1
    said = capsys.readouterr().out
    assert str(shard) in said and "damaged" in said


def test_stores_of_different_images_other_settings_or_kinds_are_refused(folder, make_latents, monkeypatch, tmp_path):
    other = make_latents(tmp_path / "other", number=499)
    with pytest.raises(DataError, match=r"are of other images \(499\) than --latents .* \(500\)"):
        cluster_latents(folder / "latents", other / "features", tmp_path / "out", 64)
    with pytest.raises(DataError, match=r"are of other images \(500\) than --latents .* \(499\)"):
        cluster_latents(other / "latents", folder / "features", tmp_path / "out", 64)
    with pytest.raises(DataError, match="holds latents, not features"):
        cluster_latents(folder / "latents", folder / "latents", tmp_path / "out", 64)
    shutil.copytree(folder / "features", tmp_path / "begun")
    (tmp_path / "begun/manifest.json").unlink()
    with pytest.raises(DataError, match=r"no manifest\.json"):
        cluster_latents(folder / "latents", tmp_path / "begun", tmp_path / "out", 64)
    assert not (tmp_path / "out").exists()
    cluster(folder, tmp_path / "out", shard_size=64)
    before = tar_bytes(tmp_path / "out")
    with pytest.raises(DataError, match=r"shard_size=65.*shard_size=64"):
        cluster(folder, tmp_path / "out", shard_size=65)
    assert tar_bytes(tmp_path / "out") == before
    arguments = ["--latents", folder / "latents", "--features", other / "features", "--out", tmp_path / "new"]
    error = tool(monkeypatch, *arguments, "--procs", 1)
    assert error.startswith("error: --features ") and "\n" not in error
    assert not (tmp_path / "new").exists()


def test_fewer_images_than_a_unit_are_one_shard(make_latents, tmp_path):
    folder = make_latents(tmp_path / "set", number=13, shards=2, neighbors=3)
    manifest = cluster(folder, tmp_path / "out", shard_size=4)
    assert [shard["images"] for shard in manifest["shards"]] == [13]


def test_shards_of_other_features_are_not_added(folder, make_latents, tmp_path):
    """Of the same images by the same network: its precision, or the crop, may be another."""
    cluster(folder, tmp_path / "out")
    shard = sorted((tmp_path / "out").glob("*.tar"))[1]
    shard.unlink()
    shutil.copytree(folder / "features", tmp_path / "features")
    manifest = json.loads((tmp_path / "features/manifest.json").read_text())
    manifest["shards"][0]["sha256"] = "0" * 64
    (tmp_path / "features/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"features=.* was begun with features="):
        cluster_latents(folder / "latents", tmp_path / "features", tmp_path / "out", 64)
    assert not shard.exists()
