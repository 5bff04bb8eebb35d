"""Image files, the stores that are made of them, and what is said when that is refused."""

import io

import numpy as np
import pytest
import webdataset
from PIL import Image

from data.errors import UserError
from data.stores.store import Store, read_manifest
from trainer.precompute import precompute_features, precompute_latents, precompute_pixels

SIDE = 64


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


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def write_tar(path, samples):
    path.parent.mkdir(exist_ok=True)
    with webdataset.TarWriter(str(path)) as tar:
        for sample in samples:
            tar.write(sample)


def sample(key, seed, label):
    return {"__key__": key, "jpg": encoded(noise(seed), "JPEG", quality=95), "cls": label}


def latents(images, out, vae, **changes):
    options = {"image_size": SIDE, "precision": "fp32", "dtype": "float32", "part_size": 4, "batch": 3}
    options |= {"workers": 0, "max_rejects": 0, **changes}
    return precompute_latents(images, out, str(vae), **options)


def features(images, out, encoder, **changes):
    options = {"precision": "fp32", "part_size": 5, "batch": 3, "workers": 0, "max_rejects": 0, **changes}
    return precompute_features(images, out, str(encoder), **options)


def pixels(images, out, **changes):
    return precompute_pixels(
        images, out, **{"image_size": 16, "part_size": 5, "workers": 0, "max_rejects": 0, **changes}
    )


def stored(out, field="moments", kind="latents"):
    """{key: (label, array)} of a store."""
    store = Store(out, read_manifest(out, kind, ""))
    keys = [key.decode() for key in store.index["key"]]
    rows = zip(store.index["label"].tolist(), store.read(field, np.arange(len(store))), strict=True)
    return dict(zip(keys, rows, strict=True))


def refused(function, *arguments, **changes):
    """What the UserError says, which must be one line."""
    with pytest.raises(UserError) as error:
        function(*arguments, **changes)
    assert "\n" not in str(error.value)
    return str(error.value)


def shards(out):
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(out.glob("*.tar"))}
