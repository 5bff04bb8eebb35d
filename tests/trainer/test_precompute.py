"""Latents and features from image files to stores and back, by tiny networks."""

import io
import json
import shutil
import subprocess

import numpy as np
import pytest
import torch
import transformers
import webdataset
from diffusers import AutoencoderKL
from PIL import Image

from data.extraction.sources import list_source
from data.extraction.verify import verify_store
from data.stores.files import WORK
from tests.stores import SIDE, encoded, features, latents, noise, refused, shards, stored, write

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


def test_moments_that_are_too_large_for_float16_are_refused_and_fit_float32(plain, save_vae, tmp_path):
    large = save_vae(seed=2)
    network = AutoencoderKL.from_pretrained(large)
    network.quant_conv.weight.data *= 1e6
    network.save_pretrained(large)
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
    assert (vectors @ vectors.T)[~np.eye(len(vectors), dtype=bool)].max() < 1 - 1e-5, "images differ"


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
    before = {"images": str(plain)} | latents(plain, out, vae)["settings"]
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


def test_of_complete_work_nothing_is_left_but_the_store(plain, vae, tmp_path):
    out = tmp_path / "out"
    latents(plain, out, vae)
    latents(plain, out, vae)
    expected = {f"latents-{i:06d}.{kind}" for i in range(6) for kind in ("tar", "json")}
    expected |= {"settings.json", "inputs.json", "index.npy", "manifest.json", "rejected.jsonl"}
    assert {str(path.relative_to(out)) for path in out.rglob("*")} == expected
