"""Neighbour graphs in folders: exact and by FAISS, through the tool, by many processes, killed and started again."""

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import data.neighbors.graph
from data.batches.groups import similar_groups
from data.errors import DataError
from data.neighbors.exact import NeighborGraph
from data.neighbors.graph import build_graph, open_graph, round_down
from data.stores.store import Store, read_manifest
from tests.patience import PATIENCE

FILES = ("ids.npy", "similarities.npy", "manifest.json")


@pytest.fixture(scope="module")
def folder(make_latents, tmp_path_factory):
    """500 images of 6 kinds, their exact graph of 12 neighbours in /graph."""
    return make_latents(tmp_path_factory.mktemp("graph"), number=500)


def rows_of(folder):
    manifest = read_manifest(folder / "features", "features", "")
    return Store(folder / "features", manifest).read("feature", np.arange(manifest["images"])).astype(np.float64)


def cosines(rows):
    norm = np.linalg.norm(rows, axis=1)
    cosine = rows @ rows.T / (norm[:, None] * norm)
    np.fill_diagonal(cosine, -np.inf)
    return cosine


def build(folder, out, neighbors=12, method="exact", probes=1, precision="fp32", **processes):
    build_graph(folder / "features", out, neighbors, method, probes, precision, "cpu", **processes)


def contents(folder):
    return {name: (folder / name).read_bytes() for name in FILES}


def tool(monkeypatch, capsys, *arguments):
    """(exit code or error, stdout) of tools/build_neighbors.py."""
    monkeypatch.syspath_prepend("tools")
    monkeypatch.setattr(sys, "argv", ["build_neighbors.py", *map(str, arguments)])
    error = 0
    try:
        runpy.run_path("tools/build_neighbors.py", run_name="__main__")
    except SystemExit as end:
        error = end.code
    return error, capsys.readouterr().out


@pytest.mark.parametrize("seed", range(6))
def test_rounding_down_gives_the_largest_float16_that_is_not_above(seed):
    rng = np.random.default_rng(seed)
    grid = np.arange(2**16, dtype=np.uint16).view(np.float16)
    grid = grid[np.isfinite(grid) & (abs(grid) <= 1)].astype(np.float64)
    values = [rng.uniform(-1, 1, 5000), 10.0 ** rng.uniform(-12, 0, 5000) * rng.choice([-1, 1], 5000), grid]
    values += [np.nextafter(grid, -np.inf), np.nextafter(grid, np.inf), (grid[1:] + grid[:-1]) / 2]
    values = np.concatenate(values)
    down = round_down(values)
    assert down.dtype == np.float16
    assert (down.astype(np.float64) <= values).all()
    assert (np.nextafter(down, np.float16(np.inf)).astype(np.float64) > values).all()
    assert (round_down(grid) == grid).all()


@pytest.mark.parametrize("seed", range(8))
def test_a_threshold_on_stored_similarities_never_admits_a_pair_below_it(seed):
    """Pairs of images at cosines on the grid of float16 and just beside it, thresholds there as well."""
    rng = np.random.default_rng(seed)
    grid = rng.choice(np.arange(0.25, 1, 2**-11), 40).astype(np.float16).astype(np.float64)
    near = np.concatenate([grid, np.nextafter(grid, 0), np.nextafter(grid, 1), grid - 1e-5, grid + 1e-5])
    similarity = np.repeat(rng.permutation(near), 2)[:, None]
    partner = np.arange(len(similarity), dtype=np.int32).reshape(-1, 2)[:, ::-1].reshape(-1, 1)
    graph = NeighborGraph(partner, round_down(similarity))
    for threshold in rng.choice(near, 25):
        groups = similar_groups(graph, float(threshold), 2, len(near), rng)
        admitted = similarity[groups[:, 0], 0]
        assert (admitted >= threshold).all()
        step = np.nextafter(np.float16(threshold), np.float16(2)).astype(np.float64)
        assert (np.sort(admitted)[::-1][: (near >= step).sum()] >= threshold).all()
        assert len(groups) >= (near >= step).sum(), "and those a step above it are all admitted"


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.70068359375, 0.9, float(np.nextafter(0.5, 1)), -0.2, 1.0])
def test_groups_of_a_stored_graph_keep_the_threshold_in_float64(folder, threshold):
    graph, _ = open_graph(folder / "graph")
    cosine = cosines(rows_of(folder))
    for size in (2, 4):
        for anchor, *members in similar_groups(graph, threshold, size, 500 // size, np.random.default_rng(size)):
            assert (cosine[anchor, members] >= threshold).all()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("part", "block"), [(16_384, 1024), (64, 64), (77, 10), (7, 3), (499, 1024), (500, 7)])
def test_a_stored_graph_is_that_of_brute_force_however_it_is_cut(folder, precision, part, block, monkeypatch, tmp_path):
    monkeypatch.setattr(data.neighbors.graph, "PART", part)
    monkeypatch.setattr(data.neighbors.graph, "BLOCK", block)
    build(folder, tmp_path / "out", precision=precision)
    graph, manifest = open_graph(tmp_path / "out")
    cosine = cosines(rows_of(folder))
    expected = np.argsort(-cosine, axis=1, kind="stable")[:, :12]
    np.testing.assert_array_equal(graph.ids, expected)
    np.testing.assert_array_equal(graph.similarities, round_down(np.take_along_axis(cosine, expected, axis=1)))
    assert manifest["recall"] == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted([*FILES, "settings.json"])


def test_a_graph_is_memory_mapped_and_its_manifest_names_the_features(folder):
    graph, manifest = open_graph(folder / "graph")
    assert isinstance(graph.ids, np.memmap) and isinstance(graph.similarities, np.memmap)
    assert graph.ids.dtype == np.int32 and graph.similarities.dtype == np.float16
    assert graph.ids.shape == graph.similarities.shape == (500, 12)
    features = read_manifest(folder / "features", "features", "")
    assert manifest["kind"] == "neighbors" and manifest["images"] == 500
    assert manifest["settings"]["name"] == "no/encoder" and manifest["settings"]["keys"] == features["keys"]
    assert manifest["settings"]["neighbors"] == 12 and manifest["settings"]["method"] == "exact"


SLOWLY = """
import sys, time
from pathlib import Path
import data.neighbors.graph, data.neighbors.exact

data.neighbors.graph.PART, data.neighbors.graph.BLOCK = 25, 5
find = data.neighbors.exact.ExactSearch.nearest
data.neighbors.exact.ExactSearch.nearest = lambda *arguments: time.sleep(float(sys.argv[5])) or find(*arguments)
features, out, process, processes = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
data.neighbors.graph.build_graph(features, out, 12, "exact", 1, "fp32", "cpu", process, processes)
"""


def start(folder, out, processes, pause):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    commands = [[sys.executable, "-c", SLOWLY, folder / "features", out, i, processes, pause] for i in range(processes)]
    return [
        subprocess.Popen([str(word) for word in command], env=env, stderr=subprocess.PIPE, text=True)
        for command in commands
    ]


def test_killed_and_started_again_with_other_numbers_of_processes_the_files_are_the_same(folder, tmp_path):
    out, ready = tmp_path / "out", 0
    for processes, more in ((2, 4), (1, 3)):
        running = start(folder, out, processes, 0.03)
        end = time.monotonic() + PATIENCE
        while len(list(out.glob("parts/*.npz"))) < ready + more:
            assert time.monotonic() < end and all(process.poll() is None for process in running)
            time.sleep(0.005)
        for process in running:
            process.send_signal(signal.SIGKILL)
            process.communicate()
        ready = len(list(out.glob("parts/*.npz")))
        assert ready < 20 and not (out / "manifest.json").exists()
        with pytest.raises(DataError, match=r"no manifest\.json in it, so not \(yet\) complete"):
            open_graph(out)
    for process in start(folder, out, 3, 0):
        _, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, errors
    assert contents(out) == contents(folder / "graph")
    assert not list(out.rglob("*.npz"))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"neighbors": 11}, ["neighbors=11", "neighbors=12"]),
        ({"method": "ivf", "probes": 3}, ["method=ivf, 3 probes", "method=exact"]),
        ({"other": True}, ["features=", "keys="]),
    ],
)
def test_a_folder_of_other_settings_is_refused_and_stays(folder, change, named, make_latents, tmp_path):
    out = shutil.copytree(folder / "graph", tmp_path / "out")
    before = contents(out)
    other = change.pop("other", False)
    features = make_latents(tmp_path / "other", number=500, seed=1) if other else folder
    with pytest.raises(DataError) as error:
        build(features, out, **change)
    message = str(error.value)
    assert any(name in message for name in named) if other else all(name in message for name in named)
    assert "\n" not in message and contents(out) == before


@pytest.mark.parametrize("neighbors", [500, 501, 10**9])
def test_more_neighbors_than_there_are_others_is_an_error_of_one_line(folder, neighbors, monkeypatch, capsys, tmp_path):
    arguments = ["--features", folder / "features", "--out", tmp_path / "out", "--neighbors", neighbors]
    error, _ = tool(monkeypatch, capsys, *arguments)
    assert error == f"error: --neighbors {neighbors}: must be from 1 to 499, one less than there are images"
    assert not (tmp_path / "out").exists()
    build(folder, tmp_path / "most", neighbors=499)
    assert (np.sort(open_graph(tmp_path / "most")[0].ids, axis=1)[:, :3] <= 3).all()


def test_a_features_folder_that_is_missing_incomplete_or_none_is_an_error_of_one_line(
    folder, monkeypatch, capsys, tmp_path
):
    shutil.copytree(folder / "features", tmp_path / "begun")
    (tmp_path / "begun/manifest.json").unlink()
    for features, said in (
        (tmp_path / "nothing", "no manifest.json in it"),
        (
            tmp_path / "begun",
            "no manifest.json in it, so not (yet) complete; make it with tools/precompute_features.py",
        ),
        (folder / "latents", "holds latents, not features"),
        (folder / "graph", "holds neighbors, not features"),
    ):
        error, _ = tool(monkeypatch, capsys, "--features", features, "--out", tmp_path / "out")
        assert error.startswith(f"error: {features}: ") and said in error and "\n" not in error
    assert not (tmp_path / "out").exists()


def check_approximate(folder, out):
    """Its recall over all images, and that what was found is as it should be."""
    graph, _ = open_graph(out)
    cosine = cosines(rows_of(folder))
    for i, found in enumerate(graph.ids):
        assert i not in found and len(set(found)) == 12 and found.min() >= 0
    np.testing.assert_array_equal(graph.similarities, round_down(np.take_along_axis(cosine, graph.ids, axis=1)))
    assert (np.diff(np.take_along_axis(cosine, graph.ids, axis=1), axis=1) <= 0).all()
    true = np.argsort(-cosine, axis=1, kind="stable")[:, :12]
    return np.mean([np.isin(t, f).mean() for t, f in zip(true, graph.ids, strict=True)])


@pytest.mark.parametrize(("number", "seed"), [(500, 0), (640, 1), (90, 2)])
@pytest.mark.parametrize("probes", [1, 2])
def test_faiss_says_its_true_recall_and_similarities_are_exact(
    make_latents, number, seed, probes, monkeypatch, capsys, tmp_path
):
    pytest.importorskip("faiss")
    folder = make_latents(tmp_path / "set", number=number, kinds=100, seed=seed)
    arguments = ["--features", folder / "features", "--out", tmp_path / "out", "--neighbors", 12]
    error, said = tool(monkeypatch, capsys, *arguments, "--method", "ivf", "--probes", probes, "--procs", 1)
    assert error == 0
    recall = check_approximate(folder, tmp_path / "out")
    assert re.search(r"recall of the 12 nearest: (\S+) ", said)[1] == f"{recall:.4f}"
    assert json.loads((tmp_path / "out/manifest.json").read_text())["recall"] == pytest.approx(recall, abs=1e-12)
    assert recall < 1 or number == 90 or probes > 1


@pytest.mark.parametrize("seed", range(3))
def test_faiss_with_all_lists_looked_through_finds_all(make_latents, seed, tmp_path):
    pytest.importorskip("faiss")
    folder = make_latents(tmp_path / "set", number=500, width=32, seed=seed)
    build(folder, tmp_path / "out", method="ivf", probes=10**6)
    assert check_approximate(folder, tmp_path / "out") == 1
    assert open_graph(tmp_path / "out")[1]["recall"] == 1


def test_faiss_of_images_with_few_in_their_list_finds_as_many_as_are_asked_for(make_latents, tmp_path):
    pytest.importorskip("faiss")
    folder = make_latents(tmp_path / "set", number=400, kinds=30, seed=3)
    build(folder, tmp_path / "out", neighbors=200, method="ivf", probes=1)
    graph, _ = open_graph(tmp_path / "out")
    assert all(len(set(found)) == 200 and i not in found for i, found in enumerate(graph.ids))
