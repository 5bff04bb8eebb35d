"""The preprocessing tools as a user runs them: real processes, killed for real."""

import json
import random
import re
import resource
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

from data.errors import DataError
from data.extraction.crop import center_crop
from data.stores.shards import MANIFEST
from data.stores.store import Store, read_manifest
from tests.in_process import call
from tests.patience import PATIENCE
from trainer.precompute import precompute_latents

FAST = ["--size", 32, "--shard-size", 8, "--batch", 4, "--workers", 0, "--precision", "fp32"]


def latents(images, out, vae, *more):
    return ["precompute_latents", "--images", images, "--out", out, "--vae", vae, *FAST, *more]


def make(images, out, vae, **changes):
    """The same in this process."""
    options = {"image_size": 32, "precision": "fp32", "dtype": "float32", "part_size": 8, "batch": 4, **changes}
    precompute_latents(images=images, out=out, vae=str(vae), workers=0, max_rejects=0, **options)


def moments_of(out):
    """{key: moments} of a store."""
    store = Store(out, read_manifest(out, "latents", ""))
    keys = [key.decode() for key in store.index["key"]]
    return dict(zip(keys, store.read("moments", np.arange(len(store))), strict=True))


@pytest.fixture(scope="module")
def undisturbed(tool, photographs, vae, tmp_path_factory):
    """Latents of all photographs in float32, by one process."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    done = tool(*latents(photographs, out, vae, "--dtype", "float32"))
    assert "96 images, 0 rejected" in done.out
    assert "img/s" in done.err and "100%" in done.err and "rejected=0" in done.err
    return out


def test_moments_are_those_of_the_vae_for_the_image_and_for_its_mirror_image(undisturbed, photographs, vae):
    network = AutoencoderKL.from_pretrained(vae)
    found = moments_of(undisturbed)
    assert len(found) == 96
    differ = []
    for key in random.Random(0).sample(sorted(found), 12):
        pixels = center_crop(Image.open(photographs / f"{key}.jpg").convert("RGB"), 32).transpose(2, 0, 1)
        x = torch.from_numpy(pixels.copy())[None] / 127.5 - 1
        with torch.no_grad():
            for image, stored in zip((x, x.flip(3)), found[key], strict=True):
                posterior = network.encode(image).latent_dist
                expected = torch.cat([posterior.mean, posterior.logvar], dim=1)[0]
                np.testing.assert_allclose(stored, expected.numpy(), rtol=0, atol=2e-5)
        differ.append(np.abs(found[key][1] - found[key][0][..., ::-1]).max())
    assert min(differ) > 1e-3, "the mirrored moments would not do"


def test_float16_keeps_the_nearest_and_bf16_comes_near(undisturbed, photographs, vae, tmp_path):
    exact = moments_of(undisturbed)
    make(photographs, tmp_path / "half", vae, dtype="float16")
    for key, half in moments_of(tmp_path / "half").items():
        assert half.dtype == np.float16
        np.testing.assert_allclose(half, exact[key], rtol=1e-3, atol=1e-3)
    make(photographs, tmp_path / "bf16", vae, precision="bf16")
    errors = [np.abs(bf16 - exact[key]).mean() for key, bf16 in moments_of(tmp_path / "bf16").items()]
    assert 0 < np.mean(errors) < 0.05 * np.mean([np.abs(m).mean() for m in exact.values()])


def test_killed_at_any_time_and_started_again_every_image_is_there_once(
    tool, start_tool, undisturbed, photographs, vae, tmp_path
):
    """More of this, by processes that are forked, in tests/data/test_extract.py."""
    out, rng = tmp_path / "out", random.SystemRandom()
    command = latents(photographs, out, vae, "--dtype", "float32")
    for processes in (3, 2):
        running = [start_tool(*command) for _ in range(processes)]
        begun = time.monotonic()
        while not list(out.glob("latents-*.tar")) and time.monotonic() < begun + PATIENCE:
            time.sleep(0.01)
        for process in running:
            time.sleep(rng.uniform(0, 0.25))
            process.send_signal(signal.SIGKILL)
        for process in running:
            process.communicate()
    shards = {path: path.stat().st_mtime_ns for path in out.glob("latents-*.tar")}
    assert shards
    tool(*command, "--procs", 2)
    assert all(path.stat().st_mtime_ns == when for path, when in shards.items()), "nothing is done twice"
    assert "verified" in call(*command, "--verify").out
    found, expected = moments_of(out), moments_of(undisturbed)
    assert found.keys() == expected.keys()
    for key in found:
        np.testing.assert_allclose(found[key], expected[key], rtol=0, atol=2e-5)
    assert not (out / ".work").exists() and not [path for path in out.iterdir() if path.name.startswith(".")]


def test_verify_says_what_is_wrong_and_fails_and_the_shard_can_be_made_again(undisturbed, photographs, vae, tmp_path):
    out = shutil.copytree(undisturbed, tmp_path / "out")
    shard = out / "latents-000004.tar"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert "latents-000004.tar" in call(*latents(photographs, out, vae), "--verify", code=1).out
    shard.unlink()
    make(photographs, out, vae)
    call(*latents(photographs, out, vae), "--verify")


def test_damaged_images_are_listed_and_end_the_tool_with_an_error_unless_allowed(tool, photographs, vae, tmp_path):
    images = shutil.copytree(photographs, tmp_path / "images")
    whole = (images / "class0/000.jpg").read_bytes()
    (images / "class0/000.jpg").write_bytes(whole[: len(whole) // 2])
    (images / "class1/001.jpg").write_bytes(b"")
    (images / "class2/002.jpg").write_text("not an image")
    command = latents(images, tmp_path / "out", vae)
    failed = tool(*command, code=1)
    assert "error: " in failed.err and "3 images could not be read, more than --max-rejects 0" in failed.err
    assert "rejected=3" in failed.err
    rows = [json.loads(line) for line in (tmp_path / "out/rejected.jsonl").read_text().splitlines()]
    assert {row["key"] for row in rows} == {"class0/000", "class1/001", "class2/002"}
    assert all(row["reason"] and (tmp_path / "out" / row["shard"]).exists() for row in rows)
    assert not (tmp_path / "out" / MANIFEST).exists()
    call(*command, "--max-rejects", 2, code=1)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    assert "93 images, 3 rejected" in call(*command, "--max-rejects", 3).out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")} == written
    call(*command, "--verify")


def test_a_mended_image_comes_in_when_its_shard_is_removed(photographs, vae, tmp_path):
    images = shutil.copytree(photographs, tmp_path / "images")
    whole = (images / "class0/000.jpg").read_bytes()
    (images / "class0/000.jpg").write_bytes(whole[:50])
    command = latents(images, tmp_path / "out", vae)
    call(*command, "--max-rejects", 1)
    (images / "class0/000.jpg").write_bytes(whole)
    shard = json.loads((tmp_path / "out/rejected.jsonl").read_text())["shard"]
    (tmp_path / "out" / shard).unlink()
    assert "96 images, 0 rejected" in call(*command).out
    call(*command, "--verify")


def test_a_full_disk_is_said_and_complete_shards_stay(tool, photographs, vae, tmp_path):
    """A shard of 8 images is 23 kB in float16, 36 kB in float32; the limit stands between, below the last is less."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (24_000, 24_000))

    images = shutil.copytree(photographs, tmp_path / "images")
    command = latents(images, tmp_path / "out", vae, "--shard-size", 20)
    failed = tool(*command, code=1, preexec_fn=limit)
    last = failed.err.strip().splitlines()[-1]
    assert last.startswith("error: --out ") and "File too large" in last and "what is complete stays" in last
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert not [name for name in left if name.endswith(".tar")], "no half-written shard has a final name"
    call(*command)
    call(*command, "--verify")


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("vae_weights", {}),
        ("size", {"image_size": 40}),
        ("dtype", {"dtype": "float16"}),
        ("precision", {"precision": "bf16"}),
        ("shard_size", {"part_size": 9}),
        ("scaling_factor", {}),
        ("images", {}),
    ],
)
def test_one_folder_holds_latents_of_one_kind(save_vae, undisturbed, photographs, vae, tmp_path, field, changes):
    out = shutil.copytree(undisturbed, tmp_path / "out")
    if field in ("vae_weights", "scaling_factor"):
        vae = save_vae(seed=1) if field == "vae_weights" else save_vae(scaling_factor=0.5)
    images = shutil.copytree(photographs, tmp_path / "images") if field == "images" else photographs
    before = {"images": str(photographs)} | json.loads((undisturbed / "settings.json").read_text())
    with pytest.raises(DataError, match=f"^{field}=.*: .* was begun with {field}={before[field]}; ") as error:
        make(images, out, vae, **changes)
    assert "\n" not in str(error.value)
    assert {p.name for p in out.iterdir()} == {p.name for p in undisturbed.iterdir()}


def test_a_copy_of_the_same_vae_is_the_same_vae(undisturbed, photographs, vae, tmp_path):
    copy = shutil.copytree(vae, tmp_path / "copy")
    make(photographs, undisturbed, copy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--images", "nowhere"], "--images .*nowhere: no such folder"),
        (["--vae", "/nowhere/vae"], "--vae /nowhere/vae: cannot be loaded"),
        (["--size", 36], "--size 36: must be a multiple of the VAE's factor, 8"),
        (["--nodes", 2], "sbatch: not found"),
    ],
)
def test_wrong_options_are_one_line(photographs, vae, tmp_path, options, message, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    error = call(*latents(photographs, tmp_path / "out", vae, *options), code=1).err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert re.search(message, error)


@pytest.mark.parametrize(
    "options",
    [["--batch", 0], ["--shard-size", -3], ["--workers", -1], ["--nodes", 0], ["--size", "x"], ["--precision", "fp64"]],
)
def test_impossible_values_are_refused(photographs, vae, tmp_path, options):
    assert options[0] in call(*latents(photographs, tmp_path / "out", vae, *options), code=2).err
    assert not (tmp_path / "out").exists()


def test_features_are_unit_vectors_of_the_encoder_in_the_latents_order(
    tool, undisturbed, photographs, encoder, tmp_path
):
    options = ["--images", photographs, "--out", tmp_path / "out", "--encoder", encoder, "--workers", 1]
    options += ["--shard-size", 13, "--batch", 5, "--precision", "fp32"]
    tool("precompute_features", *options)
    call("precompute_features", *options, "--verify")
    manifest = read_manifest(tmp_path / "out", "features", "")
    assert manifest["keys"] == read_manifest(undisturbed, "latents", "")["keys"], "in spite of other shards"
    store = Store(tmp_path / "out", manifest)
    features = store.read("feature", np.arange(96))
    assert features.dtype == np.float16
    np.testing.assert_allclose(np.linalg.norm(features.astype(float), axis=1), 1, atol=1e-3)
    network, processor = AutoModel.from_pretrained(encoder), AutoImageProcessor.from_pretrained(encoder)
    for i in range(0, 96, 9):
        image = Image.open(photographs / f"{store.index['key'][i].decode()}.jpg").convert("RGB")
        with torch.no_grad():
            output = network(**processor(image, return_tensors="pt")).last_hidden_state[0, 0]
        np.testing.assert_allclose(features[i], (output / output.norm()).numpy(), atol=3e-4)
    assert np.std(features.astype(float) @ features[0].astype(float)) > 0.001, "images differ"
