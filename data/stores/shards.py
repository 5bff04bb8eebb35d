"""Write a store: WebDataset tar shards of fixed-size arrays, an index, and a manifest that describes them.

settings.json     all that determines the arrays; other settings are refused
NAME-000012.tar   per sample, `key.FIELD.npy` for each field, and `key.cls`
NAME-000012.json  keys, labels and byte offsets of that shard, its checksum, and images that could not be read
index.npy         keys, labels and byte offsets of all shards, in order: an image's number is its row
manifest.json     settings, counts, checksums; appears once all shards exist
rejected.jsonl    images that could not be read
"""

import json
import shutil
from collections.abc import Mapping
from hashlib import sha256 as new_hash
from pathlib import Path

import numpy as np
from webdataset.writer import TarWriter

from data.errors import DataError
from data.stores.claims import wait_for_lock
from data.stores.files import WORK, appearing, partial_of, sha256, write_json
from data.stores.tar import tar_samples

SETTINGS, INDEX, MANIFEST, REJECTED = "settings.json", "index.npy", "manifest.json", "rejected.jsonl"


def shard_names(kind: str, parts: int) -> list[str]:
    """Return the names of the shards of a store of `kind` (say, latents), in order."""
    return [f"{kind}-{part:06d}.tar" for part in range(parts)]


def agree_on_settings(folder: Path, settings: dict, unsaid: dict | None = None) -> None:
    """Record the settings in the folder. Raise DataError if it was begun with others. `unsaid`: settings of older
    versions, which did not record them."""
    path = folder / SETTINGS
    if not path.exists():
        with wait_for_lock(folder, SETTINGS):
            if not path.exists():
                write_json(path, settings)
    before, now = (unsaid or {}) | json.loads(path.read_text()), json.loads(json.dumps(settings))
    for name in (before | now).keys() - {"name"}:  # a network is identified by its weights, not its name
        if before.get(name) != now.get(name):
            raise DataError(
                f"{name}={now.get(name)}: {folder} was begun with {name}={before.get(name)}; set it back, or give"
                " another --out"
            )


def write_shard(
    path: Path, keys: list[str], labels: list[int], arrays: Mapping[str, np.ndarray], rejected: list[dict]
) -> None:
    """Write a shard, whose sample i has `arrays[field][i]` for each field, and its record. The shard appears last,
    whole."""
    if len(set(keys)) < len(keys):
        raise DataError(f"{path}: key {max(keys, key=keys.count)} comes more than once in the input")
    with appearing(path) as file:
        with TarWriter(file, mtime=0, format="PAX_FORMAT") as tar:
            for i, (key, label) in enumerate(zip(keys, labels, strict=True)):
                fields = {f"{name}.npy": array[i] for name, array in arrays.items()}
                tar.write({"__key__": key, **fields, "cls": label})
        file.flush()
        partial = partial_of(path)
        sizes = {name: array[0].nbytes for name, array in arrays.items()}
        index = [(key, array_offsets(members, sizes)) for key, members in tar_samples(partial)]
        if [key for key, _ in index] != keys:
            raise DataError(f"{path}: keys came back otherwise than they were written: is one there twice?")
        record = {
            "images": len(keys),
            "sha256": sha256(partial),
            "fields": {name: {"shape": array.shape[1:], "dtype": str(array.dtype)} for name, array in arrays.items()},
            "keys": keys,
            "labels": labels,
            "offsets": {name: [offsets[name] for _, offsets in index] for name in arrays},
            "rejected": rejected,
        }
        write_json(record_of(path), record)


def record_of(shard: Path) -> Path:
    """Return the path of the record of a shard."""
    return shard.with_suffix(".json")


def array_offsets(members: dict[str, tuple[int, int]], sizes: dict[str, int]) -> dict[str, int]:
    """Return the offset in the tar file at which the numbers of each field begin: the member for a field is a header,
    then an array of `sizes[field]` bytes."""
    places = {name: members[f"{name}.npy"] for name in sizes}
    return {name: offset + length - sizes[name] for name, (offset, length) in places.items()}


def begin(folder: Path, shards: list[Path]) -> None:
    """Remove the manifest if shards are missing, so that nobody reads an incomplete store."""
    if (folder / MANIFEST).exists() and not all(shard.exists() for shard in shards):
        with wait_for_lock(folder, MANIFEST):
            if not all(shard.exists() for shard in shards):
                (folder / MANIFEST).unlink(missing_ok=True)


def finish(folder: Path, kind: str, parts: int, num_classes: int | None, max_rejects: int) -> dict | None:
    """Write the index and the manifest and return the manifest, if all shards exist; return None otherwise.

    `num_classes` None: as many as the labels need. Raise DataError if more than `max_rejects` images could not be read.
    """
    shards = [folder / name for name in shard_names(kind, parts)]
    if not all(shard.exists() for shard in shards):
        return None
    with wait_for_lock(folder, MANIFEST):
        manifest = _finish(folder, kind, shards, num_classes, max_rejects)
    shutil.rmtree(folder / WORK, ignore_errors=True)
    return manifest


def _finish(folder: Path, kind: str, shards: list[Path], num_classes: int | None, max_rejects: int) -> dict:
    records = [json.loads(record_of(shard).read_text()) for shard in shards]
    listed = [
        {"name": shard.name, "images": record["images"], "sha256": record["sha256"]}
        for shard, record in zip(shards, records, strict=True)
    ]
    if (folder / MANIFEST).exists():
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["shards"] == listed:
            return manifest
        (folder / MANIFEST).unlink()  # of shards that have been remade since
    rejected = [{"shard": s.name, **row} for s, r in zip(shards, records, strict=True) for row in r["rejected"]]
    with appearing(folder / REJECTED) as file:
        file.writelines((json.dumps(row) + "\n").encode() for row in rejected)
    if len(rejected) > max_rejects:
        raise DataError(
            f"{folder / REJECTED}: {len(rejected)} images could not be read, more than --max-rejects {max_rejects};"
            " allow them, or fix them, remove the shards named there, and start again"
        )
    fields = next((record["fields"] for record in records if record["images"]), None)
    if fields is None:
        raise DataError(f"{folder}: not one image could be read; see {REJECTED}")
    index = _index(records, list(fields))
    _refuse_doubles(folder, index["key"])
    with appearing(folder / INDEX) as file:
        np.save(file, index)
    manifest = {
        "kind": kind,
        "images": len(index),
        "num_classes": num_classes or int(index["label"].max()) + 1,
        "rejected": len(rejected),
        "fields": fields,
        "keys": keys_digest(index["key"]),
        "settings": json.loads((folder / SETTINGS).read_text()),
        "shards": listed,
    }
    write_json(folder / MANIFEST, manifest)
    return manifest


def keys_digest(keys: np.ndarray) -> str:
    """Return a checksum of the images' keys in their order: stores with the same digest number their images alike."""
    return new_hash(b"\n".join(keys.tolist())).hexdigest()


def _index(records: list[dict], fields: list[str]) -> np.ndarray:
    """Return a row per image: key, label, shard, and the byte offset of each field."""
    keys = np.array([key.encode() for record in records for key in record["keys"]])
    columns = [("key", keys.dtype), ("label", np.int32), ("shard", np.int32), *((name, np.int64) for name in fields)]
    index = np.empty(len(keys), columns)
    index["key"] = keys
    index["label"] = [label for record in records for label in record["labels"]]
    index["shard"] = np.repeat(np.arange(len(records)), [record["images"] for record in records])
    for name in fields:
        index[name] = [offset for record in records for offset in record["offsets"].get(name, [])]
    return index


def _refuse_doubles(folder: Path, keys: np.ndarray) -> None:
    found, number = np.unique(keys, return_counts=True)
    if len(found) < len(keys):
        raise DataError(f"{folder}: key {found[number > 1][0].decode()} comes {number.max()} times in the input")
