"""What version 0.1.0 left behind is good for this one: runs go on, samples, exports and stores are what they were.

By the command lines alone. tests/legacy/v0_1/README.md says what there is. CPUs round differently: hence tolerances.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.in_process import call
from tests.patience import PATIENCE

ARTEFACTS = Path(__file__).parent / "v0_1/artefacts.tar.xz"
PLACE = "/tmp/v0_1"  # where they were made
LENGTHS = {"run": 3840, "latents-run": 480, "jit-run": 2560, "ddpm-run": 1920, "plain-run": 1920}  # as expected/ has it
ALONE = {  # to go on in one process without an engine
    "latents-run": ["shard_size=null"],
    "ddpm-run": ["deepspeed={}"],
}
HERE = ["--cluster", "debug"]


@pytest.fixture
def old(tmp_path):
    """A copy, in whose files that a user may edit the paths are true."""
    with tarfile.open(ARTEFACTS) as archive:
        archive.extractall(tmp_path, filter="data")
    for path in [*tmp_path.glob("*.yaml"), *tmp_path.glob("*/config.yaml"), *tmp_path.glob("*/inputs.json")]:
        path.write_text(path.read_text().replace(PLACE, str(tmp_path)))
    return tmp_path


def losses(run):
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def expected_losses(old, name):
    return pytest.approx(json.loads((old / f"expected/{name}.json").read_text()), abs=1e-4)


def exported(run, *options):
    out = run.parent / "exported.safetensors"
    out.unlink(missing_ok=True)
    call("export_weights", run, out, *options)
    return load_file(out)


def check_close(found, expected, start=None):
    """To 0.2 % of the most that changed since `start`, else to 1e-6 of the values. Not keys' biases: attention does not
    depend on them (but in JiT), so that AdamW makes steps of rounding errors."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        change = (tensor - start[name]).abs().max() if start else 1e-3 * tensor.abs().max()
        difference = (found[name] - tensor).abs()
        if name.endswith("attn.qkv.bias"):
            difference = difference.unflatten(0, (3, -1))[[0, 2]]
        assert difference.max() <= 2e-3 * change, (name, difference.max(), change)


def check_equal(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def check_pixels(file, expected):
    found, expected = np.load(file), np.load(expected)
    assert (found["arr_1"] == expected["arr_1"]).all() and found["arr_0"].dtype == np.uint8
    assert found["arr_0"].shape == expected["arr_0"].shape
    difference = abs(found["arr_0"].astype(int) - expected["arr_0"])
    assert (difference <= 1).mean() >= 0.99, (difference.max(), (difference > 1).mean())


def of_latents(old):
    """Where a checkpoint finds its data now."""
    return [f"data.latents={old}/latents", f"data.neighbors={old}/neighbors", f"data.vae={old}/vae"]


@pytest.mark.parametrize("name", LENGTHS)
def test_a_run_goes_on_to_the_same_weights(old, name):
    run, more = old / name, ["engine=single", f"train.images={LENGTHS[name]}", *ALONE.get(name, [])]
    before, start = losses(run), exported(run)
    said = call("submit", *HERE, run / "config.yaml", f"run={run}", *more)
    assert said.out == f"finished: {run}\n" and "continuing from" in said.err
    assert losses(run)[: len(before)] == before and losses(run) == expected_losses(old, f"{name}-continued")
    check_close(exported(run), load_file(old / f"expected/{name}-continued.safetensors"), start)
    snapshots = ["000000001280", "000000002560", "000000003840"] if name == "run" else []
    assert sorted(path.name for path in run.glob("snapshots/*")) == snapshots


def test_a_plain_run_keeps_the_sample_embedding_that_plain_networks_now_lack(old):
    """A user's config does not name it: the run goes on as ever, and its samples are those of a network without."""
    run, config = old / "plain-run", old / "user/config.yaml"
    config.parent.mkdir()
    text = (run / "config.yaml").read_text()
    assert text.count("  max_group_size: 1\n") == 1
    config.write_text(text.replace("  max_group_size: 1\n", ""))
    weights = old / "expected/plain-run.safetensors"
    call("sample", config, "--weights", weights, "--out", old / "samples", "sample.per_class=2")
    check_pixels(old / "samples/samples.npz", old / "expected/plain-run-samples.npz")

    start = exported(run)
    call("submit", *HERE, config, f"run={run}", f"train.images={LENGTHS['plain-run']}")
    assert losses(run) == expected_losses(old, "plain-run-continued")
    check_close(exported(run), load_file(old / "expected/plain-run-continued.safetensors"), start)
    assert "  max_group_size: 1\n" in (run / "config.yaml").read_text()

    new = ["optim.lr=1e-30", "train.images=64", f"init_from={weights}", f"run={old}/new"]
    call("submit", *HERE, config, *new)
    expected = load_file(weights)
    expected["y_embedder.embedding_table.weight"] += expected.pop("sample_embedder.embedding_table.weight")
    check_close(exported(old / "new", "--raw"), expected)


def test_it_goes_on_likewise_on_two_ranks(old):
    """In the usual way, supervised; the folder has a state.json and no logs/."""
    run = old / "run"
    start = exported(run)
    assert "finished" in call("submit", "--status", run).out
    arguments = ["--cluster", "local", "--procs", "2", run / "config.yaml", f"run={run}", "train.images=3840"]
    command, env = [sys.executable, "tools/submit.py", *arguments], os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0 and f"finished: {run}" in done.stdout, done.stderr
    assert losses(run) == expected_losses(old, "run-continued")
    check_close(exported(run), load_file(old / "expected/run-continued.safetensors"), start)


def test_of_its_config_the_same_may_change_as_ever(old):
    run = old / "run"
    before = (run / "config.yaml").read_bytes()
    for change in ("optim.lr=1", "model.mlp_ratio=2", "groups.share=0.5", "path.name=gvp", "seed=1", "data.flip=false"):
        field, value = change.split("=")
        error = call("submit", *HERE, run / "config.yaml", f"run={run}", change, code=1).err
        assert error.startswith("error: ") and "set it back, or set run= to a new folder" in error, (field, value)
    assert (run / "config.yaml").read_bytes() == before


@pytest.mark.parametrize("name", LENGTHS)
def test_samples_are_the_same(old, name):
    data = of_latents(old) if name == "latents-run" else []
    call("sample", old / name, "--out", old / "samples", "sample.per_class=2", *data)
    check_pixels(old / "samples/samples.npz", old / f"expected/{name}-samples.npz")


def test_samples_for_metrics_that_were_begun_are_completed(old):
    run = old / "run"
    path = run / "samples-40/settings.json"
    path.write_text(path.read_text().replace(PLACE, str(old)))
    kept = (run / "samples-40/parts/part-000000.npz").stat().st_mtime_ns
    assert "40 images" in call("sample", run, "--num", 40, "sample.batch=16").out
    check_pixels(run / "samples-40/samples.npz", old / "expected/run-samples-40.npz")
    assert (run / "samples-40/parts/part-000000.npz").stat().st_mtime_ns == kept


def test_samples_can_be_evaluated_and_shown(old):
    run = old / "run"
    record = json.loads((run / "samples.json").read_text())
    report = json.loads(call("evaluate", run).out)
    assert report["samples"] == record and report["images"] == 20 and report["frechet"] > report["frechet_train"]
    page = Path(call("report", run).out.strip()).read_text()
    assert "global_batch" in page and "frechet" in page


def test_exports_and_reconstructions_are_the_same(old):
    """But for one factor of reconstructions: those of this version were sums whose factors did not add up to 1."""
    check_equal(exported(old / "run"), load_file(old / "expected/run.safetensors"))
    call("reconstruct_ema", old / "run", old / "ema.safetensors", "--std", "0.12")
    found, before = load_file(old / "ema.safetensors"), load_file(old / "expected/run-ema-0.12.safetensors")
    now, then = (torch.cat([weights[name].flatten() for name in sorted(before)]) for weights in (found, before))
    factor = float(now @ then / then.square().sum())
    assert 1.1 < factor < 1.15
    check_close(found, {name: tensor * factor for name, tensor in before.items()})


def test_exports_can_be_sampled_and_guide(old):
    weights = old / "expected/run.safetensors"
    call("sample", old / "run", "--weights", weights, "--out", old / "a", "sample.per_class=2")
    check_pixels(old / "a/samples.npz", old / "expected/run-samples.npz")
    call("sample", old / "run/config.yaml", "--weights", weights, "--out", old / "b", "sample.per_class=2")
    check_pixels(old / "b/samples.npz", old / "expected/run-samples.npz")
    call("sample", old / "run", f"sample.weaker={weights}", "--out", old / "c", "sample.per_class=2")
    call("sample", old / "run", f"sample.weaker={old}/run", "--out", old / "d", "sample.per_class=2")
    check_pixels(old / "c/samples.npz", old / "d/samples.npz")


@pytest.mark.parametrize("source", ["expected/run.safetensors", "run", "run/checkpoints/000000002560"])
def test_runs_start_from_exports_runs_and_checkpoints(old, source):
    new = old / "new"
    options = [f"init_from={old / source}", "engine=single", "optim.lr=1e-30", "train.images=64", f"run={new}"]
    call("submit", *HERE, old / "run/config.yaml", *options)
    check_close(exported(new, "--raw"), load_file(old / "expected/run.safetensors"))


def test_an_export_becomes_diffusers_network(old):
    from diffusers import DiTTransformer2DModel

    file, out = old / "expected/plain-run.safetensors", old / "diffusers"
    assert "DiTTransformer2DModel.from_pretrained" in call("convert_weights", "--to", "diffusers", file, out).out
    found, expected = DiTTransformer2DModel.from_pretrained(out).state_dict(), load_file(file)
    assert torch.equal(found["proj_out_2.weight"], expected["final_layer.linear.weight"])
    classes = expected["y_embedder.embedding_table.weight"] + expected["sample_embedder.embedding_table.weight"]
    theirs = found["transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"]
    assert torch.equal(theirs, classes)


@pytest.mark.parametrize("kind", ["latents", "features", "pixels"])
def test_stores_are_verified(old, kind):
    made = f"precompute_{kind}"
    assert "every image once" in call(made, "--images", old / "images", "--out", old / kind, "--verify").out
    shard = old / kind / f"{kind}-000001.tar"
    shard.write_bytes(shard.read_bytes().replace(b"class", b"clasp"))
    said = call(made, "--images", old / "images", "--out", old / kind, "--verify", code=1).out
    assert "damaged; remove it and start again" in said


def test_a_store_is_completed(old):
    """And other settings are refused, as in a folder of this version."""
    whole = shutil.copytree(old / "pixels", old / "whole")
    command = ["precompute_pixels", "--images", old / "images", "--out", old / "pixels", "--workers", 0, "--procs", 1]
    (old / "pixels/pixels-000001.tar").unlink()
    assert "begun with size=8" in call(*command, "--shard-size", 12, "--size", 6, code=1).err
    assert "complete, 24 images" in call(*command, "--shard-size", 12, "--size", 8).out
    for path in whole.iterdir():
        assert path.name == "inputs.json" or (old / "pixels" / path.name).read_bytes() == path.read_bytes(), path.name


def test_latents_of_before_are_completed_by_the_same_vae(old):
    shard = old / "latents/latents-000000.tar"
    before = shard.read_bytes()
    shard.unlink()
    options = ["--shard-size", 12, "--workers", 0, "--procs", 1, "--size", 8, "--vae", old / "vae"]
    said = call("precompute_latents", "--images", old / "images", "--out", old / "latents", *options).out
    assert "complete, 24 images" in said and len(shard.read_bytes()) == len(before)
    call("precompute_latents", "--images", old / "images", "--out", old / "latents", "--verify")


def test_a_neighbor_graph_is_complete_and_would_be_made_alike(old):
    options = ["--features", old / "features", "--neighbors", 7, "--procs", 1]
    assert "complete, 24 images" in call("build_neighbors", *options, "--out", old / "neighbors").out
    call("build_neighbors", *options, "--out", old / "again")
    for name in ("ids.npy", "similarities.npy"):
        assert (np.load(old / "again" / name) == np.load(old / "neighbors" / name)).all()
    assert "begun with" in call("build_neighbors", *options, "--neighbors", 6, "--out", old / "neighbors", code=1).err


@pytest.mark.parametrize("name", ["pixels", "streamed"])
def test_a_config_of_a_user_trains_on_stores(old, name):
    if name == "streamed":
        stores = ["--latents", old / "latents", "--features", old / "features"]
        call("cluster_latents", *stores, "--out", old / "clustered", "--shard-size", 6, "--procs", 1)
    call("submit", *HERE, old / f"{name}.yaml")
    assert losses(old / f"{name}-run") == expected_losses(old, f"{name}-run")
