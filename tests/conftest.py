"""What tests of several folders need."""

import numpy as np
import pytest

from data.graph import build_graph
from data.shards import agree_on_settings, finish, shard_names, write_shard


@pytest.fixture(scope="session")
def make_latents():
    """A store of random latents in `folder`/latents and, with `width`, features of that many numbers in /features and
    their neighbour graph in /graph. Images come in `kinds` of which one is like the other."""

    def make(
        folder, number=96, shards=3, shape=(2, 4, 4), classes=3, width=8, neighbors=12, kinds=6, seed=0, scaling=0.5
    ):
        rng = np.random.default_rng([seed, 5])
        label = rng.integers(classes, size=number)
        kind = rng.integers(kinds, size=number)
        moments = rng.normal(size=(number, 2, 2 * shape[0], *shape[1:])).astype(np.float16)
        features = rng.normal(size=(kinds, width))[kind] + 0.2 * rng.normal(size=(number, width))
        features = (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float16)
        vae = {"name": "no/vae", "scaling_factor": scaling, "shift_factor": 0.25}
        for store, name, array, settings in (
            ("latents", "moments", moments, vae),
            ("features", "feature", features, {"name": "no/encoder", "encoder_weights": str(seed)}),
        ):
            agree_on_settings(folder / store, settings)
            for path, part in zip(shard_names(store, shards), np.array_split(np.arange(number), shards), strict=True):
                keys = [f"c{label[i]}/{i:05d}" for i in part]
                write_shard(folder / store / path, keys, label[part].tolist(), {name: array[part]}, [])
            finish(folder / store, store, shards, classes, 0)
        build_graph(folder / "features", folder / "graph", neighbors, "exact", 1, "fp32", "cpu")
        return folder

    return make
