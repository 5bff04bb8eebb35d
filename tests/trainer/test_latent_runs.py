"""Runs on latents: by number or streamed, stopped and continued, and what is refused before anything is written."""

import runpy
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from data.batches.plan import make_planner
from data.errors import DataError, UserError
from data.neighbors.clusters import cluster_latents
from data.sets.registry import open_images
from data.sets.streamed_latents import StreamedLatents
from tests.trainer.forked import train_tiny
from trainer.config.tree import load_config
from trainer.errors import RunError
from trainer.loop import train
from trainer.sampling.decode import make_decoder

SIMILAR = ["groups.neighbors=12", "groups.threshold=0.8"]
FULL = ["groups.variant=full", "groups.share=1", "groups.size=4", "train.micro_batch=8"]


@pytest.fixture(scope="module")
def folder(make_latents, tmp_path_factory):
    """160 images in four shards, and the same in ten of similar ones in /clustered."""
    folder = make_latents(tmp_path_factory.mktemp("latents"), number=160, shards=4)
    cluster_latents(folder / "latents", folder / "features", folder / "clustered", 16)
    return folder


def by_number(folder):
    return ["data.name=latents", f"data.latents={folder}/latents", f"data.neighbors={folder}/graph", *SIMILAR]


def streamed(folder):
    return ["data.name=latents", f"data.latents={folder}/clustered", "data.streaming=true", "data.window=2", *SIMILAR]


def losses(rows):
    return [row["loss"] for row in rows]


def test_a_run_by_number_counts_the_fallbacks_of_its_plan_on_any_ranks(ranks, folder, metrics, tiny, tmp_path):
    settings = {"light": by_number(folder), "full": [*by_number(folder), *FULL]}
    pair = [[f"run={tmp_path}/{name}-2", *overrides] for name, overrides in settings.items()]
    said = ranks.run_many(2, train_tiny, *pair)
    for name, overrides in settings.items():
        config = load_config(tiny, [f"run={tmp_path}/{name}-1", "engine=single", "data.workers=2", *overrides])
        assert train(config) == "finished"
        images = open_images(config.data)
        plan_of_epoch, steps = make_planner(config.groups, images, 32, config.seed), len(images) // 32
        expected = []
        for step in range(20):
            plan, row = plan_of_epoch(step // steps), step % steps
            first, last = (int(plan.grouped[:end].sum()) // config.groups.size for end in (row, row + 1))
            expected.append(int(plan.fallback[first:last].sum()))
        one, two = metrics(tmp_path / f"{name}-1"), metrics(tmp_path / f"{name}-2")
        assert [row["fallbacks"] for row in one] == [row["fallbacks"] for row in two] == expected
        assert [row["grouped"] for row in two] == [config.groups.share] * 20
        assert losses(one) == pytest.approx(losses(two), abs=1e-4)
        assert any(expected) == (name == "full")
        if name == "full":
            plan = plan_of_epoch(0)
            assert f"epoch 0: {plan.fallback.sum()} of {len(plan.fallback)} groups are fallbacks" in said


def test_a_streamed_run_goes_on_bit_for_bit_at_its_world_size_and_says_so_at_another(
    ranks, folder, metrics, tensors, tiny, tmp_path, capfd
):
    overrides = [*streamed(folder), "checkpoint.every=96"]
    whole, stopped, other = (tmp_path / name for name in ("whole", "stopped", "other"))
    half = "train.images=352"
    said = ranks.run_many(
        2,
        train_tiny,
        [f"run={whole}", *overrides],
        [f"run={stopped}", *overrides, half],
        [f"run={stopped}", *overrides, "data.workers=1"],
        [f"run={other}", *overrides, half],
    )
    assert metrics(stopped) == metrics(whole)
    assert len(metrics(whole)) == 20
    a, b = (tensors(run / "checkpoints/000000000640") for run in (whole, stopped))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert "continuing from" in said and "deals the shards anew" not in said

    before = metrics(other)
    capfd.readouterr()
    assert train(load_config(tiny, [f"run={other}", *overrides, "engine=single"])) == "finished"
    said = capfd.readouterr().err
    assert "1 ranks instead of 2: data.streaming deals the shards anew" in said
    assert "continuing from" in said and "000000000352" in said
    rows = metrics(other)
    assert rows[: len(before)] == before and [row["step"] for row in rows] == list(range(20))
    assert losses(rows) != losses(metrics(whole))
    assert np.isfinite(losses(rows)).all()


def refused(folder, tmp_path, make_latents):
    """[(overrides of a good run, what the message has in it)]."""
    other = make_latents(tmp_path / "other", number=96, seed=3)
    shutil.copytree(folder / "latents", tmp_path / "begun")
    (tmp_path / "begun/manifest.json").unlink()
    stream = ["data.streaming=true", "data.neighbors=null"]
    return [
        (["data.channels=4"], ["data.channels=4: ", "data.channels=2"]),
        (["data.side=32"], ["data.side=32: ", "data.side=4"]),
        (["data.scaling=0.18215"], ["data.scaling=0.18215: ", "data.scaling=0.5"]),
        ([f"data.neighbors={other}/graph"], [f"data.neighbors={other}/graph: ", "other images (96", f"{folder}"]),
        (["data.neighbors=null"], ["data.neighbors=null: ", "tools/build_neighbors.py"]),
        ([f"data.neighbors={tmp_path}/nothing"], [f"{tmp_path}/nothing: no manifest.json"]),
        (["groups.neighbors=13"], ["groups.neighbors=13: 12 are known"]),
        ([f"data.latents={tmp_path}/begun"], [f"{tmp_path}/begun: no manifest.json", "tools/precompute_latents.py"]),
        ([f"data.latents={folder}/features"], [f"{folder}/features: holds features, not latents"]),
        (["train.global_batch=192", "train.images=640"], ["train.global_batch=192: more than there are images"]),
        (stream, ["data.streaming=true: ", "holds no features"]),
        ([*stream, "data.channels=4"], ["data.channels=4: ", "data.channels=2"]),
    ]


def test_what_does_not_fit_is_refused_in_one_line_and_nothing_is_written(
    folder, make_latents, tiny, monkeypatch, capsys, tmp_path
):
    monkeypatch.syspath_prepend("tools")
    run = tmp_path / "run"
    for overrides, said in refused(folder, tmp_path, make_latents):
        arguments = [str(tiny), f"run={run}", *by_number(folder), *overrides]
        monkeypatch.setattr(sys, "argv", ["submit.py", "--cluster", "local", "--procs", "2", *arguments])
        with pytest.raises(SystemExit) as end:
            runpy.run_path("tools/submit.py", run_name="__main__")
        with pytest.raises(UserError) as error:  # as with torchrun
            train(load_config(tiny, [*arguments[1:], "engine=single"]))
        assert end.value.code == f"error: {error.value}"
        assert all(words in str(error.value) for words in said), (said, str(error.value))
        assert "\n" not in str(error.value)
        assert not run.exists(), overrides


def test_the_exit_code_is_1_and_a_run_that_was_there_stays_as_it_is(folder, make_latents, tiny, tmp_path):
    run = tmp_path / "run"
    overrides = [*by_number(folder), f"run={run}", "data.scaling=0.5"]
    train(load_config(tiny, [*overrides, "engine=single", "train.images=64"]))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    moved = make_latents(tmp_path / "moved", number=160, shards=4, scaling=0.25)
    shutil.move(folder / "latents", tmp_path / "aside")
    shutil.copytree(moved / "latents", folder / "latents")
    try:
        command = [sys.executable, "tools/submit.py", "--cluster", "local", "--procs", "2", str(tiny), *overrides]
        done = subprocess.run(command, capture_output=True, text=True)
    finally:
        shutil.rmtree(folder / "latents")
        shutil.move(tmp_path / "aside", folder / "latents")
    assert done.returncode == 1
    assert done.stderr.startswith("error: data.scaling=0.5: ") and "have 0.25" in done.stderr
    assert done.stderr.count("\n") == 1
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_damaged_shard_ends_a_streamed_run_with_its_name(folder, tiny, tmp_path):
    shutil.copytree(folder / "clustered", tmp_path / "clustered")
    for shard in (tmp_path / "clustered").glob("*.tar"):
        content = shard.read_bytes()
        shard.write_bytes(content[: len(content) // 2 // 512 * 512])
    config = load_config(tiny, [*streamed(tmp_path), f"run={tmp_path}/run", "engine=single"])
    with pytest.raises(DataError, match=r"latents-\d{6}\.tar: holds \d+ images, should be 16; remove it"):
        train(config)
    assert not (tmp_path / "run/checkpoints").exists()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("how", ["cut", "overwritten", "empty", "gone"])
def test_the_damaged_one_of_some_shards_is_named(folder, tmp_path, how, seed):
    shutil.copytree(folder / "clustered", tmp_path / "clustered")
    rng = np.random.default_rng(seed)
    number, shards = rng.integers(10), sorted((tmp_path / "clustered").glob("*.tar"))
    content, place = bytearray(shards[number].read_bytes()), rng.integers(1000, 9000)
    content[place : place + 512] = rng.bytes(512)  # at least one header of a member
    shards[number].unlink()
    if how != "gone":
        shards[number].write_bytes({"cut": content[:place], "overwritten": content, "empty": b""}[how])
    images = StreamedLatents(str(tmp_path / "clustered"), None, False, {})
    with pytest.raises(DataError, match=f"{shards[number].name}: .* start what made .* again") as error:
        images.read_shards(tuple(range(10)))
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def make_vae(tmp_path_factory):
    """A small random VAE; its folder."""

    def make(channels):
        torch.manual_seed(channels)
        down, up = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
        config = {"block_out_channels": (8, 8), "norm_num_groups": 8, "scaling_factor": 0.5, "shift_factor": 0.25}
        vae = AutoencoderKL(down_block_types=down, up_block_types=up, latent_channels=channels, **config)
        folder = tmp_path_factory.mktemp("vae")
        vae.save_pretrained(folder)
        return folder

    return make


@torch.no_grad()
def test_samples_are_decoded_in_parts_as_the_vae_does(make_vae):
    folder, cpu = make_vae(2), torch.device("cpu")
    samples = torch.randn(3, 11, 2, 4, 6)
    pixels = make_decoder(str(folder), 2, cpu)(samples)
    assert pixels.shape == (3, 11, 3, 8, 12) and pixels.dtype == torch.float32
    network = AutoencoderKL.from_pretrained(folder).eval()
    for row in range(3):
        expected = network.decode(samples[row] / 0.5 + 0.25).sample
        assert torch.allclose(pixels[row], expected, atol=1e-5)
    assert make_decoder(None, 2, cpu)(samples) is samples


def test_a_vae_that_cannot_decode_the_samples_ends_the_run_before_it_begins(folder, make_vae, tiny, tmp_path):
    """It is missing, or it has latents of other channels: not only when the first samples are due."""
    run = tmp_path / "run"
    overrides = [*by_number(folder), f"run={run}", "engine=single", "train.sample_every=320"]
    for vae in (tmp_path / "nothing", make_vae(4)):
        with pytest.raises(RunError, match=r"^data\.vae=") as error:
            train(load_config(tiny, [*overrides, f"data.vae={vae}"]))
        assert str(vae) in str(error.value) and "\n" not in str(error.value)
        assert not run.exists()
    assert train(load_config(tiny, [*overrides, f"data.vae={make_vae(2)}"])) == "finished"
