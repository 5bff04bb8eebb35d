"""Latents and features from image files to stores and back, by tiny networks; what is wrong with inputs is one line."""

import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import tarfile
import time

import numpy as np
import pytest
import torch
import transformers
import webdataset
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file

from data.extract import Work, extract
from data.files import WORK
from data.shards import MANIFEST
from data.sources import list_source, shared_source
from data.store import Store, read_manifest
from data.verify import verify_store
from models.vae import VAE
from trainer.errors import RunError
from trainer.precompute import precompute_features, precompute_latents

SIDE = 64
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def save_vae(tmp_path_factory):
    """Save a small random VAE of 8 pixels to a latent; its folder."""

    def save(seed=0, scale=0.3, **config):
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            norm_num_groups=8,
            **config,
        )
        for parameter in vae.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        vae.quant_conv.weight.data *= scale / 0.3
        folder = tmp_path_factory.mktemp("vae")
        vae.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="module")
def vae(save_vae):
    return save_vae()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A small random CLIP."""
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 40}
    network = transformers.CLIPModel(
        transformers.CLIPConfig(
            vision_config={**size, "image_size": 28, "patch_size": 14},
            text_config={**size, "vocab_size": 9},
            projection_dim=12,
        )
    )
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    folder = tmp_path_factory.mktemp("clip")
    network.save_pretrained(folder)
    crop = {"height": 28, "width": 28}
    transformers.CLIPImageProcessor(size={"shortest_edge": 30}, crop_size=crop).save_pretrained(folder)
    return folder


def noise(seed, width=40, height=50, channels=3, dtype=np.uint8):
    shape = (height, width, channels)[: 3 if channels > 1 else 2]
    coarse = np.random.default_rng(seed).integers(np.iinfo(dtype).max, size=shape, dtype=dtype)
    return Image.fromarray(coarse)


def encoded(image, file_format="PNG", **options):
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


LONG = "/".join(f"{'long' * 20}-{i}" for i in range(4)) + "/" + "x" * 240


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """Files of every kind, with awkward names; {key: content}."""
    turned = Image.Exif()
    turned[0x0112] = 6
    palette = noise(3).quantize(9)
    files = {
        "a/rgb.png": encoded(noise(0)),
        "a/cmyk.jpg": encoded(noise(1).convert("CMYK"), "JPEG"),
        "a/grey.JPEG": encoded(noise(2).convert("L"), "JPEG"),
        "a/palette.png": encoded(palette),
        "a/transparent palette.png": encoded(palette, transparency=4),
        "a/one.bit.png": encoded(noise(4).convert("1")),
        "a-b/16 bit.png": encoded(noise(5, channels=1, dtype=np.uint16)),
        "a-b/grey 100%.png": encoded(noise(6, channels=4).convert("LA")),
        "a-b/alpha..png": encoded(noise(7, channels=4)),
        "b.c/turned.jpg": encoded(noise(8), "JPEG", exif=turned),
        "b.c/deep/er/x.webp": encoded(noise(9), "WEBP", lossless=True),
        "b.c/deep/x.bmp": encoded(noise(10), "BMP"),
        "ü ö/日本 😀.tiff": encoded(noise(11), "TIFF"),
        f"ü ö/{LONG}.png": encoded(noise(12)),
        f"ü ö/{LONG[:-1]}y.png": encoded(noise(13)),
        "z/narrow.png": encoded(noise(14, 1, 90)),
        "z/flat.png": encoded(noise(15, 131, 2)),
        "z/halved twice.png": encoded(noise(16, 257, 400)),
    }
    root = tmp_path_factory.mktemp("zoo")
    for name, content in files.items():
        write(root / name, content)
    (root / "zz").mkdir()
    stems = {name: name.rpartition(".")[0].rpartition("/")[2] for name in files}
    escaped = {name: stem.replace("%", "%25").replace(".", "%2E") for name, stem in stems.items()}
    return root, {f"{name.rpartition('/')[0]}/{escaped[name]}": content for name, content in files.items()}


def adm(image, size):
    """`center_crop_arr` of guided-diffusion."""
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.BOX)
    scale = size / min(*image.size)
    image = image.resize(tuple(round(x * scale) for x in image.size), resample=Image.BICUBIC)
    array = np.array(image)
    top, left = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[top : top + size, left : left + size]


def expected_moments(vae, content):
    """Of an image and of its mirror image, by diffusers."""
    image = Image.open(io.BytesIO(content))
    image.load()
    pixels = adm(image.convert("RGB"), SIDE)
    both = torch.from_numpy(np.stack([pixels, pixels[:, ::-1]])).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        posterior = AutoencoderKL.from_pretrained(vae).encode(both).latent_dist
    return torch.cat([posterior.mean, posterior.logvar], dim=1).numpy()


def latents(images, out, vae, **changes):
    options = {"image_size": SIDE, "precision": "fp32", "dtype": "float32", "part_size": 4, "batch": 3}
    options |= {"workers": 0, "max_rejects": 0, **changes}
    return precompute_latents(images, out, str(vae), **options)


def features(images, out, encoder, **changes):
    options = {"precision": "fp32", "part_size": 5, "batch": 3, "workers": 0, "max_rejects": 0, **changes}
    return precompute_features(images, out, str(encoder), **options)


def stored(out, field="moments", kind="latents"):
    """{key: (label, array)} of a store."""
    store = Store(out, read_manifest(out, kind, ""))
    keys = [key.decode() for key in store.index["key"]]
    rows = zip(store.index["label"].tolist(), store.read(field, np.arange(len(store))), strict=True)
    return dict(zip(keys, rows, strict=True))


def refused(function, *arguments, **changes):
    """What the RunError says, which must be one line."""
    with pytest.raises(RunError) as error:
        function(*arguments, **changes)
    assert "\n" not in str(error.value)
    return str(error.value)


def shards(out):
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(out.glob("*.tar"))}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """24 images in three class folders."""
    root = tmp_path_factory.mktemp("plain")
    for i in range(24):
        write(root / f"c{i % 3}/{i:02d}.png", encoded(noise(100 + i)))
    return root


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_moments_of_every_kind_of_file_under_any_name_come_back_as_the_vae_gives_them(zoo, vae, tmp_path, dtype):
    images, contents = zoo
    out = tmp_path / "out"
    manifest = latents(images, out, vae, dtype=dtype)
    assert manifest["images"] == len(contents) and manifest["num_classes"] == 6, "also of the empty class"
    assert manifest["fields"] == {"moments": {"shape": [2, 8, 8, 8], "dtype": dtype}}
    found = stored(out)
    assert found.keys() == contents.keys()
    classes = ["a", "a-b", "b.c", "z", "zz", "ü ö"]
    tolerance = {"atol": 2e-5, "rtol": 1e-5} if dtype == "float32" else {"atol": 1e-3, "rtol": 1e-3}
    for key, (label, moments) in found.items():
        assert label == classes.index(key.split("/")[0])
        expected = expected_moments(vae, contents[key])
        np.testing.assert_allclose(moments, expected, **tolerance)
        turned_back = moments[1].astype(np.float32)[..., ::-1]
        assert abs(moments[0] - turned_back).max() > 0.01, "mirrored moments are not moments of a mirrored image"
    paths = sorted(out.glob("latents-*.tar"))
    samples = list(webdataset.WebDataset([str(path) for path in paths], shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == list(found), "in the order of the index"
    for sample in samples:
        assert sample["cls"] == found[sample["__key__"]][0]
        np.testing.assert_array_equal(sample["moments.npy"], found[sample["__key__"]][1])
    listed = "".join(subprocess.run(["tar", "tf", path], capture_output=True, text=True).stdout for path in paths)
    assert listed.count("\n") == 2 * len(contents)
    assert list(verify_store(out, list_source(images, 99))) == []


def test_worker_processes_change_nothing_and_batches_and_shards_only_how_it_is_cut(plain, vae, tmp_path):
    manifests = [
        latents(plain, tmp_path / name, vae, **changes)
        for name, changes in {
            "one": {},
            "again": {"workers": 2},
            "batch": {"batch": 7},
            "shards": {"part_size": 11, "batch": 1},
        }.items()
    ]
    assert len({manifest["keys"] for manifest in manifests}) == 1
    one, again, *others = (tmp_path / name for name in ("one", "again", "batch", "shards"))
    assert [content for content, _ in shards(one).values()] == [content for content, _ in shards(again).values()]
    assert (one / "index.npy").read_bytes() == (again / "index.npy").read_bytes()
    exact = stored(one)
    for other in others:
        for key, (label, moments) in stored(other).items():
            assert exact[key][0] == label
            np.testing.assert_allclose(moments, exact[key][1], rtol=1e-4, atol=2e-5)


def test_images_are_decoded_in_workers_whatever_way_python_starts_processes(plain, vae, tmp_path):
    """From Python 3.14 on it is not by a fork."""
    method = multiprocessing.get_start_method()
    multiprocessing.set_start_method("forkserver", force=True)
    try:
        assert latents(plain, tmp_path / "out", vae, workers=1)["images"] == 24
    finally:
        multiprocessing.set_start_method(method, force=True)


def test_moments_that_are_too_large_for_float16_are_refused_and_fit_float32(plain, save_vae, tmp_path):
    large = save_vae(scale=3e5)
    message = refused(latents, plain, tmp_path / "half", large, dtype="float16")
    assert message.startswith("c0/00: moments is not finite in float16") and "--dtype float32" in message
    assert not shards(tmp_path / "half")
    assert latents(plain, tmp_path / "single", large)["images"] == 24


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_features_are_those_of_the_model_for_the_processors_output(zoo, encoder, tmp_path, precision):
    images, contents = zoo
    features(images, tmp_path / "out", encoder, precision=precision)
    found = stored(tmp_path / "out", "feature", "features")
    assert found.keys() == contents.keys()
    network = transformers.CLIPModel.from_pretrained(encoder)
    processor = transformers.AutoImageProcessor.from_pretrained(encoder, backend="pil")
    for key, (_, feature) in found.items():
        image = Image.open(io.BytesIO(contents[key])).convert("RGB")
        with torch.no_grad():
            x = processor(image, return_tensors="pt")["pixel_values"]
            expected = network.visual_projection(network.vision_model(x).pooler_output)[0]
        assert feature.shape == (12,) and feature.dtype == np.float16
        assert np.linalg.norm(feature.astype(np.float64)) == pytest.approx(1, abs=1e-3)
        atol = 1e-3 if precision == "fp32" else 0.05
        np.testing.assert_allclose(feature, (expected / expected.norm()).numpy(), rtol=0, atol=atol)
    vectors = np.stack([feature for _, feature in found.values()]).astype(np.float64)
    assert (vectors @ vectors.T)[~np.eye(len(vectors), dtype=bool)].max() < 0.9999, "images differ"


def test_latents_and_features_of_the_same_images_have_the_same_keys_in_the_same_order(zoo, vae, encoder, tmp_path):
    images, _ = zoo
    both = [latents(images, tmp_path / "l", vae), features(images, tmp_path / "f", encoder, part_size=7)]
    assert both[0]["keys"] == both[1]["keys"] and len(both[0]["shards"]) != len(both[1]["shards"])
    shutil.copytree(images, tmp_path / "more")
    write(tmp_path / "more/a/new.png", encoded(noise(50)))
    assert features(tmp_path / "more", tmp_path / "g", encoder)["keys"] != both[0]["keys"]


@pytest.mark.parametrize(
    "field", ["vae_weights", "scaling_factor", "shift_factor", "size", "dtype", "precision", "shard_size", "images"]
)
def test_what_would_make_other_latents_is_refused_with_both_values(plain, vae, save_vae, tmp_path, field):
    out = tmp_path / "out"
    before = latents(plain, out, vae)["settings"]
    content = {path: path.read_bytes() for path in out.iterdir()}
    changes = {"size": {"image_size": 72}, "dtype": {"dtype": "float16"}, "precision": {"precision": "bf16"}}
    changes |= {"shard_size": {"part_size": 5}}
    networks = {
        "vae_weights": lambda: save_vae(seed=1),
        "scaling_factor": lambda: save_vae(scaling_factor=0.7),
        "shift_factor": lambda: save_vae(shift_factor=0.1),
    }
    images = shutil.copytree(plain, tmp_path / "images") if field == "images" else plain
    other = networks[field]() if field in networks else vae
    message = refused(latents, images, out, other, **changes.get(field, {}))
    assert message.startswith(f"{field}=") and f"begun with {field}={before[field]};" in message
    assert {path: path.read_bytes() for path in out.iterdir() if path.name != WORK} == content
    assert str(before[field]) not in message.split(":")[0], "both values are said"


def test_the_same_vae_elsewhere_and_in_another_format_goes_on(plain, vae, tmp_path):
    out = tmp_path / "out"
    latents(plain, out, vae)
    before = shards(out)
    AutoencoderKL.from_pretrained(vae).save_pretrained(tmp_path / "copy", safe_serialization=False)
    (out / "latents-000002.tar").unlink()
    latents(plain, out, tmp_path / "copy")
    after = shards(out)
    assert [content for content, _ in after.values()] == [content for content, _ in before.values()]
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"latents-000002.tar"}, "the others were not made again"


def test_an_encoder_with_another_image_processor_is_another_one(plain, encoder, tmp_path):
    features(plain, tmp_path / "out", encoder)
    other = shutil.copytree(encoder, tmp_path / "other")
    config = json.loads((other / "preprocessor_config.json").read_text())
    config["size"] = {"shortest_edge": 60}
    (other / "preprocessor_config.json").write_text(json.dumps(config))
    assert "begun with" in refused(features, plain, tmp_path / "out", other)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage(images, names):
    """Make five files bad, each in another way."""
    write(images / names[0], encoded(noise(1, 300, 300), "JPEG"))
    cut(images / names[0])
    cut(images / names[1])
    (images / names[2]).write_bytes(b"")
    (images / names[3]).write_text("no image at all")
    (images / names[4]).unlink()


def test_damaged_images_are_named_with_reason_and_shard_the_others_are_there_and_leave_is_all_it_takes(
    plain, vae, tmp_path, monkeypatch
):
    """The first shard has only damaged ones."""
    images, out = shutil.copytree(plain, tmp_path / "images"), tmp_path / "out"
    clean = latents(images, tmp_path / "clean", vae) and stored(tmp_path / "clean")
    shared_source(images, 4, out)  # as if the work had begun
    bad = ["c0/00.png", "c0/03.png", "c0/06.png", "c0/09.png", "c2/20.png"]
    damage(images, bad)
    message = refused(latents, images, out, vae)
    assert "5 images could not be read, more than --max-rejects 0" in message
    rows = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert [row["key"] for row in rows] == [name.removesuffix(".png") for name in bad]
    assert [row["shard"] for row in rows] == ["latents-000000.tar"] * 4 + ["latents-000005.tar"]
    assert [row["file"] for row in rows] == [str(images / name) for name in bad]
    assert all(row["reason"] for row in rows) and rows[4]["reason"] == "No such file or directory"
    assert not (out / MANIFEST).exists() and len(shards(out)) == 6
    refused(latents, images, out, vae, max_rejects=4)
    before = shards(out)

    def encode_again(self, images):
        raise AssertionError("what is there is not computed again")

    with monkeypatch.context() as patch:
        patch.setattr(VAE, "moments", encode_again)
        manifest = latents(images, out, vae, max_rejects=5)
    assert manifest["images"] == 19 and manifest["rejected"] == 5 and shards(out) == before
    found = stored(out)
    assert found.keys() == clean.keys() - {row["key"] for row in rows}
    for key, (label, moments) in found.items():
        assert label == clean[key][0]
        np.testing.assert_allclose(moments, clean[key][1], rtol=1e-4, atol=2e-5)
    paths = [str(path) for path in sorted(out.glob("*.tar"))]
    assert [s["__key__"] for s in webdataset.WebDataset(paths, shardshuffle=False, empty_check=False)] == list(found)
    write(images / bad[4], b"")
    assert list(verify_store(out, list_source(images, 4))) == []


def test_if_not_one_image_can_be_read_that_is_said(vae, tmp_path):
    for i in range(6):
        write(tmp_path / f"images/a/{i}.jpg", b"x" * i)
    message = refused(latents, tmp_path / "images", tmp_path / "out", vae, max_rejects=6)
    assert "not one image could be read" in message
    assert not (tmp_path / "out" / MANIFEST).exists()


def write_tar(path, samples):
    path.parent.mkdir(exist_ok=True)
    with webdataset.TarWriter(str(path)) as tar:
        for sample in samples:
            tar.write(sample)


def sample(key, seed, label):
    return {"__key__": key, "jpg": encoded(noise(seed), "JPEG", quality=95), "cls": label}


@pytest.fixture
def tars(tmp_path):
    """Uneven tar shards with keys that start anew in each; the samples by their keys."""
    contents = {}
    for number, images in enumerate((3, 1, 7)):
        samples = [sample(f"n/{i:03d}", 10 * number + i, 5 * number + i) for i in range(images)]
        write_tar(tmp_path / f"tars/train-{number}.tar", samples)
        contents |= {f"train-{number}/{one['__key__']}": one for one in samples}
    return tmp_path / "tars", contents


def test_tar_shards_become_shards_with_their_labels_and_order(tars, vae, tmp_path):
    images, contents = tars
    manifest = latents(images, tmp_path / "out", vae)
    assert [shard["images"] for shard in manifest["shards"]] == [3, 1, 7]
    assert manifest["images"] == 11 and manifest["num_classes"] == 17
    found = stored(tmp_path / "out")
    assert list(found) == list(contents)
    for key, (label, moments) in found.items():
        assert label == contents[key]["cls"]
        np.testing.assert_allclose(moments, expected_moments(vae, contents[key]["jpg"]), rtol=1e-4, atol=2e-5)
    assert list(verify_store(tmp_path / "out", list_source(images, 1))) == []


def test_samples_without_image_or_label_are_rejected_and_the_others_are_there(tars, vae, tmp_path):
    images, contents = tars
    bad = [
        {"__key__": "blind", "cls": 1},
        {"__key__": "nameless", "jpg": contents["train-0/n/000"]["jpg"]},
        {"__key__": "word", "jpg": contents["train-0/n/000"]["jpg"], "cls": b"cat"},
        {"__key__": "minus", "jpg": contents["train-0/n/000"]["jpg"], "cls": b"-1"},
    ]
    write_tar(images / "bad.tar", [bad[0], sample("good", 77, 3), *bad[1:]])
    assert "4 images could not be read" in refused(latents, images, tmp_path / "out", vae)
    manifest = latents(images, tmp_path / "out", vae, max_rejects=4)
    assert manifest["images"] == 12
    rows = [json.loads(line) for line in (tmp_path / "out/rejected.jsonl").read_text().splitlines()]
    assert {row["key"] for row in rows} == {f"bad/{one['__key__']}" for one in bad}
    assert next(iter(stored(tmp_path / "out"))) == "bad/good"
    assert list(verify_store(tmp_path / "out", list_source(images, 1))) == []


def test_one_key_twice_in_a_tar_is_refused(tars, vae, tmp_path):
    images, _ = tars
    write_tar(images / "x.tar", [sample("a", 0, 0), sample("b", 1, 0), sample("a", 2, 0)])
    assert "x/a" in refused(latents, images, tmp_path / "out", vae)


@pytest.mark.parametrize("end", [0.1, 0.5, 0.9])
def test_an_input_tar_that_was_cut_off_is_named(tars, vae, tmp_path, end):
    images, _ = tars
    path = images / "train-2.tar"
    path.write_bytes(path.read_bytes()[: int(end * path.stat().st_size)])
    assert str(path) in refused(latents, images, tmp_path / "out", vae)


def test_every_place_where_an_input_tar_may_be_cut_off_is_noticed(tmp_path):
    path = tmp_path / "a.tar"
    write_tar(path, [{"__key__": str(i), "png": b"x" * 700, "cls": i} for i in range(4)])
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        last = list(tar)[-1]
    end = -(-(last.offset_data + last.size) // 512) * 512
    for length in range(0, end, 128):
        path.write_bytes(whole[:length])
        assert "a.tar" in refused_source(tmp_path)


def refused_source(root):
    with pytest.raises(Exception, match="not a whole tar file") as error:
        list_source(root, 4).items(0)
    return str(error.value)


def test_an_input_tar_that_is_gone_is_named(tars, vae, tmp_path):
    images, _ = tars
    shared_source(images, 4, tmp_path / "out")
    (images / "train-1.tar").unlink()
    assert str(images / "train-1.tar") in refused(latents, images, tmp_path / "out", vae)


def test_a_class_folder_that_is_gone_is_named(plain, vae, tmp_path):
    images = shutil.copytree(plain, tmp_path / "images")
    shared_source(images, 4, tmp_path / "out")
    shutil.rmtree(images / "c1")
    assert str(images / "c1") in refused(latents, images, tmp_path / "out", vae)


@pytest.mark.parametrize("label", [2**31, 10**20])
def test_a_label_that_no_index_can_hold_is_said(tars, vae, tmp_path, label):
    images, _ = tars
    write_tar(images / "x.tar", [sample("a", 0, label)])
    message = refused(latents, images, tmp_path / "out", vae)
    assert str(label) in message or "rejected.jsonl" in message


@pytest.mark.parametrize("images", ["nowhere", "empty", "double"])
def test_images_that_cannot_be_used_leave_a_folder_that_the_right_ones_can_use(plain, vae, tmp_path, images):
    (tmp_path / "empty/a").mkdir(parents=True)
    for name in ("x.jpg", "x.png"):
        write(tmp_path / "double/a" / name, encoded(noise(0)))
    message = refused(latents, tmp_path / images, tmp_path / "out", vae)
    assert f"--images {tmp_path / images}: " in message
    assert latents(plain, tmp_path / "out", vae)["images"] == 24


def test_a_store_inside_the_images_folder_is_refused_or_no_class(plain, vae, tmp_path):
    """Its name goes before the classes' and would move their numbers."""
    images = shutil.copytree(plain, tmp_path / "images")
    try:
        latents(images, images / "a", vae)
    except RunError as error:
        assert "--out" in str(error)
    else:
        assert stored(images / "a")["c0/00"][0] == 0


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_an_out_folder_that_is_a_file_is_named(plain, vae, tmp_path, place):
    (tmp_path / "file").write_text("mine")
    assert str(tmp_path / "file") in refused(latents, plain, tmp_path / place, vae)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_number_of_workers_below_0_is_refused(plain, vae, tmp_path):
    with pytest.raises((RunError, ValueError), match="workers"):
        latents(plain, tmp_path / "out", vae, workers=-1)
    assert not shards(tmp_path / "out")


@pytest.mark.parametrize("size", [36, 4, 65])
def test_a_size_that_is_no_multiple_of_the_vaes_factor_is_refused(plain, vae, tmp_path, size):
    assert f"--size {size}: " in refused(latents, plain, tmp_path / "out", vae, image_size=size)
    assert not (tmp_path / "out").exists()


def lack(name, weights):
    def change(folder):
        tensors = load_file(folder / weights)
        del tensors[name]
        save_file(tensors, folder / weights, metadata={"format": "pt"})

    return change


def reshape(folder):
    tensors = load_file(folder / WEIGHTS)
    tensors["encoder.conv_in.weight"] = torch.zeros(8, 3, 5, 5)
    save_file(tensors, folder / WEIGHTS)


DAMAGES = {
    "no folder": shutil.rmtree,
    "no config": lambda folder: (folder / "config.json").unlink(),
    "config cut off": lambda folder: cut(folder / "config.json"),
}
VAE_DAMAGES = DAMAGES | {
    "weights cut off": lambda folder: cut(folder / WEIGHTS),
    "no weights": lambda folder: (folder / WEIGHTS).unlink(),
    "other shapes": reshape,
    "a weight lacks": lack("encoder.conv_in.weight", WEIGHTS),
}
ENCODER_DAMAGES = DAMAGES | {
    "weights cut off": lambda folder: cut(folder / "model.safetensors"),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "no processor": lambda folder: (folder / "preprocessor_config.json").unlink(),
    "a weight lacks": lack("visual_projection.weight", "model.safetensors"),
}


@pytest.mark.parametrize("name", VAE_DAMAGES)
def test_a_vae_that_cannot_be_loaded_is_named(plain, vae, tmp_path, name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = shutil.copytree(vae, tmp_path / "vae")
    VAE_DAMAGES[name](folder)
    assert f"--vae {folder}: cannot be loaded: " in refused(latents, plain, tmp_path / "out", folder)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ENCODER_DAMAGES)
def test_an_encoder_that_cannot_be_loaded_is_named(plain, encoder, tmp_path, name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = shutil.copytree(encoder, tmp_path / "encoder")
    ENCODER_DAMAGES[name](folder)
    assert f"--encoder {folder}: cannot be loaded: " in refused(features, plain, tmp_path / "out", folder)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 120 kB, and how it is made larger."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=120k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        yield folder, lambda: subprocess.run(["mount", "-o", "remount,size=9m", folder], check=True)
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def test_on_a_full_disk_complete_shards_stay_and_with_more_room_the_same_call_finishes(plain, vae, small_disk):
    folder, enlarge = small_disk
    message = refused(latents, plain, folder / "out", vae)
    assert "No space left on device" in message and str(folder / "out") in message
    before = shards(folder / "out")
    assert 0 < len(before) < 6
    for name in before:
        with tarfile.open(folder / "out" / name) as tar:
            assert len(tar.getnames()) == 8, "whole"
    assert [path for path in (folder / "out" / WORK).iterdir() if path.suffix != ".lock"] == []
    assert "No space left" in refused(latents, plain, folder / "out", vae)
    enlarge()
    assert latents(plain, folder / "out", vae)["images"] == 24
    assert before.items() <= shards(folder / "out").items()
    assert list(verify_store(folder / "out", list_source(plain, 4))) == []


NUMBERS = 160


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """Images that show their number; it is in their name too."""
    root = tmp_path_factory.mktemp("numbered")
    for i in range(NUMBERS):
        write(root / f"c{i % 2}/{i:03d}.png", encoded(Image.new("RGB", (8, 8), (i, 0, i % 7))))
    return root


def as_array(image):
    return np.asarray(image)


def work_of(images, out, log=None, seed=0):
    """Encoding leaves the images as they are, takes a random while, and notes who did it."""
    rng = random.Random(seed)

    def encode(batch):
        numbers = batch[:, 0, 0, 0].tolist()
        if log:
            with log.open("a") as file:
                file.write("".join(f"{number} {os.getpid()}\n" for number in numbers))
            time.sleep(rng.uniform(0, 0.008))
        return {"pixels": batch.numpy()}

    return Work("latents", images, out, {"name": "none"}, as_array, encode, 4, 2, workers=0, max_rejects=0)


def run_extract(images, out, log, seed, process, processes):
    extract(work_of(images, out, log, seed), process, processes)


def start_extract(images, out, log, rng, processes):
    context = multiprocessing.get_context("fork")
    started = [
        context.Process(target=run_extract, args=(images, out, log, rng.random(), i, processes))
        for i in range(processes)
    ]
    for process in started:
        process.start()
    return started


def wait_for_work(log):
    while not log.exists() or log.read_text().count("\n") < 10:
        time.sleep(0.001)


def encoded_by(log):
    """Number of an image -> the processes that encoded it, in this order."""
    found = {}
    for line in log.read_text().splitlines():
        number, pid = line.split()
        found.setdefault(int(number), []).append(int(pid))
    return found


@pytest.fixture(scope="module")
def undisturbed(numbered, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    extract(work_of(numbered, out))
    for key, (label, pixels) in stored(out, "pixels").items():
        assert (pixels[..., 0] == int(key[-3:])).all() and label == int(key[-3:]) % 2
    return [content for content, _ in shards(out).values()]


@pytest.mark.parametrize("seed", range(2))
def test_processes_at_once_encode_every_image_once_and_leave_what_one_leaves(numbered, undisturbed, tmp_path, seed):
    out, log = tmp_path / "out", tmp_path / "log"
    processes = start_extract(numbered, out, log, random.Random(seed), 4)
    for process in processes:
        process.join()
        assert process.exitcode == 0
    done = encoded_by(log)
    assert sorted(done) == list(range(NUMBERS)) and all(len(pids) == 1 for pids in done.values())
    assert len({pids[0] for pids in done.values()}) == 4, "they shared it"
    assert [content for content, _ in shards(out).values()] == undisturbed
    assert list(verify_store(out, list_source(numbered, 9))) == []
    assert not (out / WORK).exists()


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_and_started_again_on_other_numbers_of_processes_only_the_work_of_the_dead_is_done_again(
    numbered, undisturbed, tmp_path, seed
):
    out, log, rng = tmp_path / "out", tmp_path / "log", random.Random(seed)
    killed, rounds = set(), 0
    while not (out / MANIFEST).exists():
        rounds += 1
        assert rounds < 60
        processes = start_extract(numbered, out, log, rng, rng.randrange(1, 6))
        wait_for_work(log)
        for process in processes:
            time.sleep(rng.uniform(0, 0.06 if rounds > 1 else 0.01))
            if rounds == 1 or rng.random() < 0.8:
                process.kill()
                killed.add(process.pid)
        for process in processes:
            process.join()
            assert process.exitcode in (0, -signal.SIGKILL)
        for content in (content for content, _ in shards(out).values()):
            assert content in undisturbed, "whole, or not there"
    done = encoded_by(log)
    assert sorted(done) == list(range(NUMBERS))
    assert all(set(pids[:-1]) <= killed for pids in done.values()), "who is not killed loses nothing"
    assert rounds > 1
    extract(work_of(numbered, out, log))
    assert encoded_by(log) == done, "and once complete nothing is encoded"
    assert [content for content, _ in shards(out).values()] == undisturbed
    assert list(verify_store(out, list_source(numbered, 9))) == []
    assert not (out / WORK).exists()


def test_a_process_that_is_stopped_keeps_its_part_and_one_that_is_killed_gives_it_up(numbered, undisturbed, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    (slow,) = start_extract(numbered, out, log, random.Random(0), 1)
    try:
        wait_for_work(log)
        os.kill(slow.pid, signal.SIGSTOP)
        assert extract(work_of(numbered, out)) is None, "its part is not there"
        assert NUMBERS // 4 - 2 <= len(shards(out)) < NUMBERS // 4, "but for the one it encodes and the one it writes"
    finally:
        slow.kill()
        slow.join()
    assert extract(work_of(numbered, out))["images"] == NUMBERS
    assert [content for content, _ in shards(out).values()] == undisturbed


def test_of_complete_work_nothing_is_left_but_the_store(plain, vae, tmp_path):
    out = tmp_path / "out"
    latents(plain, out, vae)
    latents(plain, out, vae)
    expected = {f"latents-{i:06d}.{kind}" for i in range(6) for kind in ("tar", "json")}
    expected |= {"settings.json", "inputs.json", "index.npy", "manifest.json", "rejected.jsonl"}
    assert {str(path.relative_to(out)) for path in out.rglob("*")} == expected
