"""The whole evaluation by small TorchScript detectors: values by hand, the cache, real ranks, and bad input."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

from data.extraction.crop import center_crop
from tests.stores import write_tar
from tests.trainer import detectors
from tests.trainer.detectors import (
    Inception,
    Plain,
    WithSpatial,
    arr_0,
    evaluate_once,
    evaluated,
    fails,
    outputs,
    save_images,
)
from tests.trainer.evaluation.test_metrics import inception_score, neighbours
from trainer.evaluation.by_detector import evaluate_images, open_detector
from trainer.evaluation.detector import load_detector, resize_299
from trainer.evaluation.frechet import frechet_distance
from trainer.evaluation.group_correlation import group_correlation
from trainer.evaluation.groups import make_groups
from trainer.evaluation.kernel_distance import kernel_distance

CPU = torch.device("cpu")


def pictures(images, folder, names="{:05d}.png"):
    for i, image in enumerate(images):
        path = folder / names.format(i)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.squeeze()).save(path)
    return folder


def test_all_metrics_of_a_detector_of_the_form_of_inception_by_hand(there, world, tmp_path):
    """From the module itself, in one piece: features and probabilities as it gives them, and spatial features by a hook
    on mixed_6.conv: ADM's 7 of its 9 channels."""
    module, seen = Inception(), []
    module.layers.mixed_6.conv.register_forward_hook(lambda *args: seen.append(args[-1]))

    def look(images):
        x, _ = torch.from_numpy(images).movedim(3, 1), seen.clear()
        with torch.inference_mode():
            features = module(x, return_features=True).numpy()
            return (
                features,
                seen[0].permute(0, 2, 3, 1)[..., :7].flatten(1).numpy(),
                module(x, no_output_bias=True).numpy(),
            )

    made, real = (look(save_images(tmp_path / f"{n}.npz", n, seed=n - 19)) for n in (20, 25))
    with pytest.warns(UserWarning, match="rank-deficient"):  # of 567 spatial features
        record = evaluated(there, world, tmp_path, "inception.pt", tmp_path / "20.npz", tmp_path / "25.npz")
    assert made[1].shape[1] == 9 * 9 * 7
    expected = {
        "fid": frechet_distance(made[0], real[0]),
        "sfid": frechet_distance(made[1], real[1]),
        "is": inception_score(made[2].astype(np.float64)),
        "kid": kernel_distance(made[0], real[0]),
        **dict(zip(("precision", "recall"), neighbours(made[0], real[0], 3), strict=True)),
    }
    assert list(record)[: len(expected)] == list(expected)
    for name, value in expected.items():
        assert record[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert record["fid"] > 1e-3 and record["is"] > 1 + 1e-6, "they say something"


def test_resizing_is_that_of_tensorflow_1():
    """Pixel i of 299 is at i H/299 of H: between the pixels floor and floor + 1, and at most the last."""
    rng = np.random.default_rng(0)
    image = rng.random((9, 14)).astype(np.float32)
    found = resize_299(torch.from_numpy(image)[None, None].expand(1, 3, -1, -1))[0, 1].numpy()
    for y, x in rng.integers(0, 299, (200, 2)):
        top, left = y * 9 / 299, x * 14 / 299
        rows, columns = [int(top), min(int(top) + 1, 8)], [int(left), min(int(left) + 1, 13)]
        v, h = top - int(top), left - int(left)
        corners = image[np.ix_(rows, columns)]
        assert found[y, x] == pytest.approx(np.array([1 - v, v]) @ corners @ np.array([1 - h, h]), abs=2e-4)


def test_layers_that_give_other_features_than_the_whole_are_not_taken_for_its_inside(there, tmp_path):
    other = load_detector(str(detectors.save(Inception(centre=100), tmp_path / "other.pt")), CPU)
    x = torch.from_numpy(arr_0(there / "made.npz")[:5]).movedim(3, 1)
    assert set(other(x)) == {"features", "probabilities"}
    assert set(load_detector(str(there / "inception.pt"), CPU)(x)) == {"features", "probabilities", "spatial"}


def test_a_detector_may_return_spatial_features_beside_the_others(there, world, tmp_path):
    record = evaluated(there, world, tmp_path, "spatial.pt")
    made, real = (
        outputs(WithSpatial(), arr_0(there / name))[1].flatten(1).numpy() for name in ("made.npz", "real.npz")
    )
    assert record["sfid"] == pytest.approx(frechet_distance(made, real), rel=1e-4) and "is" not in record


def test_a_set_is_at_no_distance_from_itself_and_of_full_precision(there, world, tmp_path):
    record = evaluated(there, world, tmp_path, "spatial.pt", "made.npz", "made.npz")
    assert record["fid"] == pytest.approx(0, abs=1e-9) and record["sfid"] == pytest.approx(0, abs=1e-9)
    assert (record["precision"], record["recall"]) == (1, 1)


def test_dinov2_gives_the_class_token_of_the_whole_resized_image(save_encoder, there, world, tmp_path):
    folder = save_encoder("dinov2")
    record = evaluate_images(
        open_detector(str(folder), world), there / "made.npz", there / "real.npz", ["fd_dinov2"], world, tmp_path
    )
    network = AutoModel.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)

    def features(images):
        x = torch.from_numpy(images).movedim(3, 1).float()
        x = torch.nn.functional.interpolate(x, (28, 28), mode="bicubic", antialias=True)
        x = (x / 255 - mean[:, None, None]) / std[:, None, None]
        with torch.inference_mode():
            return network(x).last_hidden_state[:, 0].numpy()

    expected = frechet_distance(*(features(arr_0(there / name)) for name in ("made.npz", "real.npz")))
    assert record["fd_dinov2"] == pytest.approx(expected, rel=1e-3)
    assert record["detector"]["kind"] == "dinov2"


def test_a_folder_of_pictures_a_compressed_file_and_grey_images_are_the_same_images(there, world, tmp_path):
    images = arr_0(there / "made.npz")
    pictures(images, tmp_path / "folder", "{:05d}.png")
    np.savez_compressed(tmp_path / "compressed.npz", arr_0=images)
    np.savez(tmp_path / "fortran.npz", arr_0=np.asfortranarray(images))
    expected = evaluated(there, world, tmp_path)
    for images in ("folder", "compressed.npz", "fortran.npz"):
        found = evaluated(there, world, tmp_path, images=tmp_path / images)
        assert all(found[name] == expected[name] for name in ("fid", "kid", "precision", "recall"))
    grey = save_images(tmp_path / "grey.npz", 40, seed=3, channels=1)
    np.savez(tmp_path / "rgb.npz", arr_0=grey.repeat(3, axis=3))
    found = [evaluated(there, world, tmp_path, images=tmp_path / name)["fid"] for name in ("grey.npz", "rgb.npz")]
    assert found[0] == found[1]


@pytest.mark.parametrize("tarred", [False, True])
def test_reference_images_of_other_sizes_are_cropped_as_adm_does(there, world, tmp_path, tarred):
    rng = np.random.default_rng(5)
    images = [rng.integers(0, 256, (*rng.integers(16, 60, 2), 3), dtype=np.uint8) for _ in range(30)]
    pictures(images, tmp_path / "real", "class{0}/{0:03d}.png")
    if tarred:
        files = sorted((tmp_path / "real").rglob("*.png"))
        write_tar(tmp_path / "tars/0.tar", [{"__key__": file.stem, "png": file.read_bytes()} for file in files])
    np.savez(tmp_path / "cropped.npz", arr_0=np.stack([center_crop(Image.fromarray(image), 16) for image in images]))
    found = [
        evaluated(there, world, tmp_path / "cache", reference=tmp_path / name)["fid"]
        for name in ("tars" if tarred else "real", "cropped.npz")
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_samples_in_groups_are_measured_as_such(there, world, tmp_path):
    """With samples.json beside them; the reference may be statistics alone."""
    images, label = arr_0(there / "made.npz"), np.arange(5).repeat(60)
    np.savez(tmp_path / "samples.npz", arr_0=images, arr_1=label)
    plain = evaluated(there, world, tmp_path, images=tmp_path / "samples.npz")
    assert "group_correlation" not in plain and plain["images"].get("groups") is None
    fails(
        "--metrics group_correlation: the images are in no groups",
        *(there, world, tmp_path),
        images=tmp_path / "samples.npz",
        metrics=["group_correlation"],
    )
    (tmp_path / "samples.json").write_text('{"cond_group_size": 1, "uncond_group_size": 4}')
    found = evaluated(there, world, tmp_path, images=tmp_path / "samples.npz")
    made, real = (outputs(Plain(6), arr_0(there / name)).numpy() for name in ("made.npz", "real.npz"))
    assert found["fid_one_per_group"] == pytest.approx(frechet_distance(made[::4], real), rel=1e-4)
    assert found["group_correlation"] == pytest.approx(group_correlation(made, make_groups(label, 4)), abs=1e-4)
    assert found["images"]["groups"] == 75 and found["fid"] == plain["fid"]
    np.savez(tmp_path / "bare.npz", mu=real.mean(axis=0), sigma=np.cov(real, rowvar=False))
    bare = evaluated(
        *(there, world, tmp_path),
        images=tmp_path / "samples.npz",
        reference=tmp_path / "bare.npz",
        metrics=["fid_one_per_group", "group_correlation"],
    )
    assert bare["fid_one_per_group"] == pytest.approx(found["fid_one_per_group"], rel=1e-4)


def test_the_inception_score_is_the_same_on_any_number_of_ranks_exactly(there, ranks, tmp_path):
    found = set()
    for world_size in (1, 2, 3):
        out = tmp_path / f"{world_size}.json"
        arguments = there / "inception.pt", there / "made.npz", there / "real.npz", tmp_path, out, ["is"]
        ranks.run(world_size, evaluate_once, *arguments)
        found.add(json.loads(out.read_text())["is"])
    assert len(found) == 1


def test_1_2_and_4_ranks_give_the_same_record(there, ranks, tmp_path):
    """5 batches on 4 ranks, of which one has two."""
    records = []
    for world_size in (1, 2, 4):
        out = tmp_path / f"{world_size}.json"
        arguments = there / "spatial.pt", there / "made.npz", there / "real.npz", tmp_path / str(world_size), out
        ranks.run(world_size, evaluate_once, *arguments)
        records.append(json.loads(out.read_text()))
    for record in records[1:]:
        assert record.keys() == records[0].keys()
        for name in ("fid", "sfid", "kid"):
            assert record[name] == pytest.approx(records[0][name], rel=1e-7)
        for name in record.keys() - {"fid", "sfid", "kid"}:
            assert record[name] == records[0][name], name


def test_a_damaged_picture_ends_all_ranks_with_its_name(there, ranks, tmp_path):
    folder = pictures(arr_0(there / "made.npz"), tmp_path / "folder")
    (folder / "00299.png").write_bytes(b"no picture")
    line = ranks.fail(2, evaluate_once, there / "plain.pt", folder, there / "real.npz", tmp_path, tmp_path / "out")
    assert "00299.png: cannot be read as an image" in line and line.endswith("; remove it")


BAD_ARRAYS = {
    "of the wrong shape": (
        np.zeros((9, 8, 8), np.uint8),
        r"arr_0 is uint8 \(9, 8, 8\); give uint8 \(n, H, W, 1 or 3\)",
    ),
    "of the wrong order": (np.zeros((9, 3, 8, 8), np.uint8), r"arr_0 is uint8 \(9, 3, 8, 8\); give uint8"),
    "of no images": (np.zeros((0, 8, 8, 3), np.uint8), r"arr_0 is uint8 \(0, 8, 8, 3\); give uint8"),
    "of the wrong type": (np.zeros((9, 8, 8, 3), np.int64), r"arr_0 is int64 \(9, 8, 8, 3\); give uint8"),
    "of floats out of range": (
        np.linspace(-1.5, 300, 192, dtype=np.float32).reshape(1, 8, 8, 3),
        r"arr_0 is float32 \(1, 8, 8, 3\) from -1.5 to 300; give uint8 \(n, H, W, 1 or 3\), 0 to 255",
    ),
}


@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_an_array_that_is_no_set_of_images_is_refused(there, world, tmp_path, name):
    array, message = BAD_ARRAYS[name]
    np.savez(tmp_path / "bad.npz", arr_0=array)
    fails(f"bad.npz: {message}", there, world, tmp_path, images=tmp_path / "bad.npz")


def test_files_and_folders_that_hold_no_images_are_refused(there, world, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.npz").write_text("text")
    np.savez(tmp_path / "named.npz", images=np.zeros((2, 8, 8, 3), np.uint8))
    np.save(tmp_path / "one.npy", np.zeros((2, 8, 8, 3), np.uint8))
    np.savez(tmp_path / "three.npz", arr_0=np.zeros((3, 8, 8, 3), np.uint8))
    wrong = {
        "empty": "no images in it",
        "missing": "not there",
        "text.npz": "cannot be read",
        "named.npz": "no arr_0 in it, only images",
        "one.npy": "one array without a name",
        "three.npz": "3 images; give more than 3",
    }
    for name, message in wrong.items():
        fails(f"{name}: {message}", there, world, tmp_path, images=tmp_path / name)
        fails(f"{name}: {message}", there, world, tmp_path, reference=tmp_path / name)
    pictures([np.zeros((8, 8, 3), np.uint8)] * 4 + [np.zeros((8, 9, 3), np.uint8)], tmp_path / "sizes")
    fails("00004.png: 9x8 pixels, others have 8x8; give one size", there, world, tmp_path, images=tmp_path / "sizes")


class Wrong(torch.nn.Module):
    """What is no vector of floats per image."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "map":
            return x.float()
        if self.kind == "integers":
            return x.flatten(1)
        if self.kind == "one":
            return x.float().flatten(1)[:1].repeat(3, 1)
        return x.float().flatten(1).log() - x.float().flatten(1).log()


WRONG = {
    "map": r"its features of 1 images are torch.float32 \(1, 3, 16, 16\), not \(n, d\) of floats",
    "integers": r"its features of 1 images are torch.uint8 \(1, 768\), not \(n, d\) of floats",
    "one": r"its features of 1 images are torch.float32 \(3, 768\), not \(n, d\)",
    "nan": "its features are not finite",
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_detector_with_the_wrong_output_is_refused(there, world, tmp_path, kind):
    save_images(tmp_path / "dark.npz", 9, seed=0)
    np.savez(tmp_path / "dark.npz", arr_0=np.zeros((9, 16, 16, 3), np.uint8))
    detector = detectors.save(Wrong(kind), tmp_path / "wrong.pt")
    message = f"--detector .*wrong.pt: cannot be used: {WRONG[kind]}"
    fails(message, there, world, tmp_path, detector, images=tmp_path / "dark.npz")


def test_what_is_no_detector_is_refused(there, world, tmp_path, save_encoder):
    (tmp_path / "text.pt").write_text("text")
    for name, message in (("text.pt", "cannot be loaded"), ("missing.pt", "cannot be loaded")):
        fails(f"--detector .*{name}: {message}", there, world, tmp_path, tmp_path / name)
    fails("a model of type clip, not dinov2", there, world, tmp_path, save_encoder("clip"))
    fails("--metrics sfid: .*plain.pt offers fid, kid, precision, recall", there, world, tmp_path, metrics=["sfid"])
