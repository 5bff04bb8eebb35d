"""References: statistics that are computed and kept, files of others, and files that are none."""

import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.trainer.detectors import Plain, WithSpatial, arr_0, evaluated, fails, outputs, save_images
from trainer.errors import RunError


def test_reference_statistics_are_kept_by_the_content_of_images_and_detector(there, world, tmp_path):
    reference = Path(shutil.copy(there / "real.npz", tmp_path))
    first = evaluated(there, world, None, reference=reference)
    kept = sorted((tmp_path / "reference-statistics").glob("*.npz"))
    assert len(kept) == 1 and first["reference"]["images"] == 230
    changed = dict(np.load(kept[0]))
    np.savez(kept[0], **changed | {"mu": changed["mu"] + 1})
    assert evaluated(there, world, None, reference=reference)["fid"] > first["fid"] + 1, "they are read"
    assert evaluated(there, world, None, "spatial.pt", reference=reference)["fid"] == first["fid"], (
        "of another detector: not"
    )
    save_images(reference, 231, seed=2)
    again = evaluated(there, world, None, reference=reference)
    assert again["reference"]["sha256"] != first["reference"]["sha256"] and again["reference"]["images"] == 231
    assert evaluated(there, world, None, reference=kept[0])["fid"] > first["fid"] + 1, (
        "a kept file is a reference as well"
    )


def test_statistics_as_in_adms_files_are_used_and_their_images_for_precision_alone(there, world, tmp_path):
    images = arr_0(there / "real.npz")
    all_of_it = evaluated(there, world, tmp_path)
    features = outputs(Plain(6), images).numpy()
    mean, covariance = features.mean(axis=0), np.cov(features, rowvar=False)
    np.savez(tmp_path / "adm.npz", arr_0=images[:50], mu=mean, sigma=covariance)
    np.savez(tmp_path / "few.npz", arr_0=images[:50])
    adm = evaluated(there, world, tmp_path, reference=tmp_path / "adm.npz")
    few = evaluated(there, world, tmp_path, reference=tmp_path / "few.npz")
    assert adm["fid"] == pytest.approx(all_of_it["fid"], rel=1e-4) and adm["fid"] != pytest.approx(few["fid"], rel=1e-3)
    assert adm["recall"] == few["recall"] and adm["kid"] == few["kid"]
    np.savez(tmp_path / "bare.npz", mu=mean, sigma=covariance)
    bare = evaluated(there, world, tmp_path, reference=tmp_path / "bare.npz", metrics=["fid"])
    assert bare["fid"] == adm["fid"] and next(iter(bare)) == "fid" and "kid" not in bare
    assert adm["reference"]["images"] is None, "the file does not say of how many its mu and sigma are"
    assert adm["reference"]["features"] == 50 and "features" not in bare["reference"]
    np.savez(tmp_path / "said.npz", mu=mean, sigma=covariance, images=230)
    said = evaluated(there, world, tmp_path, reference=tmp_path / "said.npz", metrics=["fid"])
    assert said["reference"]["images"] == 230 and said["fid"] == bare["fid"]


def test_a_reference_of_statistics_alone_gives_the_metrics_that_it_allows_and_says_so(there, world, tmp_path):
    real = arr_0(there / "real.npz")
    features, spatial = (each.flatten(1).numpy() for each in outputs(WithSpatial(), real))
    moments = {
        name + end: value
        for end, each in (("", features), ("_s", spatial))
        for name, value in (("mu", each.mean(axis=0)), ("sigma", np.cov(each, rowvar=False)))
    }
    whole = evaluated(there, world, tmp_path, "spatial.pt")
    for kept, left_out in (
        (("mu", "sigma"), "sfid, kid, precision, recall"),
        (("mu_s", "sigma_s"), "fid, kid, precision, recall"),
        (("mu", "sigma", "mu_s", "sigma_s"), "kid, precision, recall"),
    ):
        np.savez(tmp_path / "bare.npz", **{name: moments[name] for name in kept})
        with pytest.warns(UserWarning) as caught:
            record = evaluated(there, world, tmp_path, "spatial.pt", reference=tmp_path / "bare.npz")
        (said,) = [str(one.message) for one in caught if "bare.npz" in str(one.message)]
        assert said.endswith(f"only {', '.join(sorted(kept))}: without images {left_out} are left out")
        found = {name for name in ("fid", "sfid", "kid", "precision", "recall") if name in record}
        assert found == {"fid", "sfid", "kid", "precision", "recall"} - set(left_out.split(", "))
        assert all(record[name] == pytest.approx(whole[name], rel=1e-4) for name in found)
    fails(
        "bare.npz: no arr_0 in it, only mu, .*, and kid need more; give a reference of images",
        *(there, world, tmp_path, "spatial.pt"),
        reference=tmp_path / "bare.npz",
        metrics=["fid", "kid"],
    )
    np.savez(tmp_path / "mixed.npz", arr_0=real[:50], mu_s=moments["mu_s"], sigma_s=moments["sigma_s"])
    mixed = evaluated(there, world, tmp_path, "spatial.pt", reference=tmp_path / "mixed.npz")
    assert mixed["sfid"] == pytest.approx(whole["sfid"], rel=1e-4), "mu_s without mu is not ignored"
    assert mixed["reference"]["images"] == mixed["reference"]["features"] == 50


NOT_PSD = np.diag([1.0, 1, 1, 1, 1, -0.5])
BAD_STATISTICS = {
    "half": ({"mu": np.zeros(6)}, "mu without sigma; give a file with both"),
    "the other half": ({"sigma": np.eye(6)}, "sigma without mu; give a file with both"),
    "nan in mu": ({"mu": np.full(6, np.nan), "sigma": np.eye(6)}, "mu has values that are not finite"),
    "nan in sigma": ({"mu": np.zeros(6), "sigma": np.full((6, 6), np.nan)}, "sigma has values that are not finite"),
    "negative": ({"mu": np.zeros(6), "sigma": NOT_PSD}, "sigma is no covariance, because it has the eigenvalue -0.5;"),
    "asymmetric": (
        {"mu": np.zeros(6), "sigma": np.eye(6) + np.eye(6, k=1)},
        "sigma is no covariance, because it is not symmetric",
    ),
    "objects": ({"mu": np.array([{}] * 6), "sigma": np.eye(6)}, "mu is an array of objects, which is not loaded"),
    "text": ({"mu": np.array(["x"] * 6), "sigma": np.eye(6)}, "mu is of type <U1; save it as numbers"),
}


@pytest.mark.parametrize("name", BAD_STATISTICS)
def test_statistics_that_are_none_are_refused_in_one_line(there, world, tmp_path, name):
    arrays, message = BAD_STATISTICS[name]
    np.savez(tmp_path / "bad.npz", arr_0=arr_0(there / "real.npz"), **arrays)
    fails(f"bad.npz: {message}", there, world, tmp_path, reference=tmp_path / "bad.npz")


def test_statistics_in_fp32_of_fewer_images_than_features_are_covariances(there, world, tmp_path):
    """Their eigenvalues are negative by rounding."""
    features = np.random.default_rng(0).standard_normal((4, 6)) * np.logspace(0, 3, 6)
    sigma = np.cov(features, rowvar=False).astype(np.float32)
    assert np.linalg.eigvalsh(sigma.astype(np.float64))[0] < 0
    np.savez(tmp_path / "few.npz", mu=features.mean(axis=0), sigma=sigma)
    assert evaluated(there, world, tmp_path, reference=tmp_path / "few.npz", metrics=["fid"])["fid"] > 0


class Danger:
    """What unpickling must not call."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("kind", ["edm2", "torch-fidelity", "an old torch.save"])
def test_pickled_statistics_are_recognised_never_loaded_and_the_command_converts_them(there, world, tmp_path, kind):
    features = outputs(Plain(6), arr_0(there / "real.npz")).numpy()
    moments = {"mu": features.mean(axis=0), "sigma": np.cov(features, rowvar=False)}
    path, touched = tmp_path / ("ref.pkl" if kind == "edm2" else "ref.pt"), tmp_path / "touched"
    for content in (Danger(touched), {"num_images": 230, "fid": moments} if kind == "edm2" else moments):
        if kind == "edm2":
            path.write_bytes(pickle.dumps(content))
        else:
            torch.save(content, path, _use_new_zipfile_serialization=kind == "torch-fidelity")
        with pytest.raises(RunError) as raised:
            evaluated(there, world, tmp_path, reference=path)
        message = str(raised.value)
        assert ("edm2's" if kind == "edm2" else "torch-fidelity's") in message and "\n" not in message
        assert not touched.exists()
    script = re.search('python -c "(.*)", and give', message)[1]
    subprocess.run([sys.executable, "-c", script], check=True)
    record = evaluated(there, world, tmp_path, reference=tmp_path / "ref.npz", metrics=["fid"])
    assert record["fid"] == pytest.approx(evaluated(there, world, tmp_path)["fid"], rel=1e-4)
    assert record["reference"]["images"] == (230 if kind == "edm2" else None)


def test_statistics_of_another_detector_are_refused(there, world, tmp_path):
    np.savez(tmp_path / "other.npz", mu=np.zeros(9), sigma=np.eye(9))
    fails(
        r"other.npz: mu \(9,\), sigma \(9, 9\), where .*plain.pt gives 6 features: statistics of another detector",
        there,
        world,
        tmp_path,
        reference=tmp_path / "other.npz",
    )
    evaluated(there, world, tmp_path / "cache", "spatial.pt")
    (kept,) = (tmp_path / "cache").glob("*.npz")
    fails("statistics of another detector than .*plain.pt", there, world, tmp_path, reference=kept)


def test_a_cache_that_cannot_be_written_is_an_error_before_the_work(there, world, tmp_path):
    (tmp_path / "file").write_text("")
    fails("cannot be made: .*; give another --cache", there, world, tmp_path / "file/cache")
