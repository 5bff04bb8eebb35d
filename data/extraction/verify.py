"""Check from the files alone that a store holds exactly the images that it was made from, each once and undamaged."""

import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data.extraction.sources import Parts
from data.stores.files import sha256
from data.stores.shards import INDEX, MANIFEST, REJECTED, array_offsets, keys_digest
from data.stores.tar import tar_samples


def verify_store(folder: Path, source: Parts) -> Iterator[str]:
    """Yield a line for each problem, none if there are no problems. Read every byte of the shards."""
    if not (folder / MANIFEST).is_file():
        yield f"{folder / MANIFEST}: not there: the store is not complete"
        return
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        index = np.load(folder / INDEX, mmap_mode="r")
        rejected = [json.loads(line) for line in (folder / REJECTED).read_text().splitlines()]
    except (OSError, ValueError) as error:
        yield f"{folder}: its manifest, index or list of rejects cannot be read ({error})"
        return
    if keys_digest(index["key"]) != manifest["keys"] or len(index) != manifest["images"]:
        yield f"{folder / INDEX}: is not the one that the manifest was written for"
    found: Counter[str] = Counter(row["key"] for row in rejected)
    for number, shard in enumerate(manifest["shards"]):
        rows = index[index["shard"] == number]
        if len(rows) != shard["images"]:
            yield f"{folder / INDEX}: {len(rows)} images of {shard['name']}, should be {shard['images']}"
        yield from _verify_shard(folder / shard["name"], shard, rows, manifest["fields"], found)
    wanted = [item for part in range(source.parts) for item in source.items(part)]
    yield from _compare(found, Counter(item.key for item in wanted))
    labels = {item.key: item.label for item in wanted}
    for row in index:
        key, label = row["key"].decode(), int(row["label"])
        if labels.get(key, label) != label:
            yield f"{key}: has label {label} in the store, {labels[key]} in the input"


def _verify_shard(path: Path, shard: dict, rows: np.ndarray, fields: dict, found: Counter[str]) -> Iterator[str]:
    if not path.is_file():
        yield f"{path}: not there"
        return
    checksum = sha256(path)
    if checksum != shard["sha256"]:
        yield f"{path}: checksum {checksum[:12]}, should be {shard['sha256'][:12]}: damaged; remove it and start again"
    sizes = {n: int(np.prod(f["shape"])) * np.dtype(f["dtype"]).itemsize for n, f in fields.items()}
    stored = {}
    try:
        with path.open("rb") as file:
            for key, members in tar_samples(path):
                found[key] += 1
                file.seek(members["cls"][0])
                stored[key] = int(file.read(members["cls"][1])), array_offsets(members, sizes)
    except (tarfile.TarError, KeyError, ValueError) as error:
        yield f"{path}: cannot be read to its end ({type(error).__name__}: {error})"
        return
    for row in rows:
        key = row["key"].decode()
        indexed = int(row["label"]), {name: int(row[name]) for name in fields}
        if key in stored and stored[key] != indexed:
            yield f"{path}: {key} has label and offsets {stored[key]}, in the index {indexed}"
    for key in stored.keys() ^ {row["key"].decode() for row in rows}:
        yield f"{path}: {key} is {'not in the index' if key in stored else 'in the index and not in the shard'}"


def _compare(found: Counter[str], wanted: Counter[str]) -> Iterator[str]:
    for key in sorted(found | wanted):
        if found[key] != wanted[key]:
            yield f"{key}: {found[key]} times in the store, {wanted[key]} times in the input"
