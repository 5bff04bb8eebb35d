"""Shards for streaming: similar images are in the same shard, so that a window of a few shards holds their groups."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data.errors import DataError
from data.extraction.sources import Item
from data.stores.claims import Claims, wait_for_lock
from data.stores.files import appearing, disk_errors
from data.stores.shards import agree_on_settings, begin, finish, shard_names, write_shard
from data.stores.store import Store, contents_digest, read_manifest

ORDER = "order.npy"
UNIT = 16  # shard sizes are multiples of this, hence of every power of two up to it as a group size
SAMPLE = 16_384


def cluster_latents(
    latents: Path, features: Path, out: Path, shard_size: int, process: int = 0, processes: int = 1
) -> dict | None:
    """Join two stores of the same images into one of latents with features, in shards of about `shard_size` similar
    images. Processes share the shards. Return the manifest, or None if others are still making some."""
    with disk_errors(out):
        return _cluster_latents(latents, features, out, shard_size, process, processes)


def _cluster_latents(
    latents: Path, features: Path, out: Path, shard_size: int, process: int, processes: int
) -> dict | None:
    moments = Store(latents, read_manifest(latents, "latents", "tools/precompute_latents.py"))
    vectors = Store(features, read_manifest(features, "features", "tools/precompute_features.py"))
    if moments.manifest["keys"] != vectors.manifest["keys"]:
        raise DataError(
            f"--features {features}: are of other images ({len(vectors)}) than --latents {latents} ({len(moments)});"
            " make both of the same"
        )
    settings = moments.manifest["settings"] | {
        "encoder_weights": vectors.manifest["settings"].get("encoder_weights"),
        "features": contents_digest(vectors.manifest),
        "shard_size": shard_size,
    }
    agree_on_settings(out, settings | {"keys": moments.manifest["keys"]})
    sizes = shard_sizes(len(moments), shard_size)
    with wait_for_lock(out, ORDER):
        if not (out / ORDER).exists():
            found = balanced_clusters(vectors.read("feature", np.arange(len(vectors))), sizes)
            with appearing(out / ORDER) as file:
                np.save(file, found)
    order = np.split(np.load(out / ORDER), np.cumsum(sizes)[:-1])
    names = shard_names("latents", len(sizes))
    begin(out, [out / name for name in names])
    claims = Claims(out, names, start=process * len(names) // processes)
    with tqdm(desc="shards", unit="shard", total=len(names), mininterval=0.5) as bar:
        for shard in claims:
            rows = moments.index[order[shard]]
            arrays = {name: moments.read(name, order[shard]) for name in moments.manifest["fields"]}
            arrays["feature"] = vectors.read("feature", order[shard])
            keys = [key.decode() for key in rows["key"]]
            write_shard(out / names[shard], keys, rows["label"].tolist(), arrays, [])
            claims.release(shard)
            bar.update(sum((out / name).exists() for name in names) - bar.n)
    return finish(out, "latents", len(names), moments.manifest["num_classes"], max_rejects=0)


def shard_sizes(images: int, shard_size: int) -> list[int]:
    """Return shard sizes of about `shard_size`, in multiples of UNIT except for the last, which takes the remainder."""
    shards = max(1, min(round(images / shard_size), images // UNIT))
    units, more = divmod(images // UNIT, shards)
    sizes = [UNIT * (units + (i < more)) for i in range(shards)]
    sizes[-1] += images - sum(sizes)
    return sizes


def balanced_clusters(features: np.ndarray, sizes: list[int]) -> np.ndarray:
    """Return the numbers of the images (n,), cluster by cluster: clusters have the given sizes, and their images are
    similar.

    The set is halved repeatedly, each time by 2-means with halves of fixed size: the images are ordered along the line
    between the two means and cut where the sizes require, which gives new means.
    """
    order = np.arange(len(features))
    rng = torch.Generator().manual_seed(0)
    todo = [(0, len(features), sizes)]
    while todo:
        start, stop, parts = todo.pop()
        if len(parts) == 1:
            continue
        half = len(parts) // 2
        cut = sum(parts[:half])
        mine = order[start:stop]
        along = _along_the_means(features, mine, cut / (stop - start), rng)
        order[start:stop] = mine[np.argsort(along, kind="stable")]
        todo += [(start, start + cut, parts[:half]), (start + cut, stop, parts[half:])]
    return order


def _along_the_means(features: np.ndarray, images: np.ndarray, share: float, rng: torch.Generator) -> np.ndarray:
    """Return the position of each image on the line between the means of the two clusters, (m,)."""
    chosen = np.linspace(0, len(images) - 1, min(len(images), SAMPLE)).astype(np.intp)
    sample = torch.from_numpy(features[images[chosen]]).float()
    lower = min(max(round(share * len(sample)), 1), len(sample) - 1)
    line = torch.randn(sample.shape[1], generator=rng)
    for _ in range(10):
        order = (sample @ line).argsort(stable=True)
        line = sample[order[lower:]].mean(dim=0) - sample[order[:lower]].mean(dim=0)
    return np.concatenate(
        [
            (torch.from_numpy(features[i]).float() @ line).numpy()
            for i in np.array_split(images, -(-len(images) // SAMPLE))
        ]
    )


@dataclass(frozen=True)
class StoredKeys:
    """The images of a store as a source (data/extraction/sources.py) for data/extraction/verify.py to compare to."""

    store: Store
    parts = 1

    def items(self, part: int) -> list[Item]:
        """Return all images."""
        rows = self.store.index
        return [
            Item(key.decode(), int(label), self.store.folder)
            for key, label in zip(rows["key"], rows["label"], strict=True)
        ]
