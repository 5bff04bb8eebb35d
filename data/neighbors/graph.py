"""The neighbour graph of a feature store, as a folder: two memory-mapped arrays and a manifest.

ids.npy           (n, k) int32, nearest first
similarities.npy  (n, k) float16, rounded down: a value that passes a threshold is truly at or above it
manifest.json     which features, how many neighbours, found by which method
"""

import shutil
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from data.errors import DataError
from data.neighbors.exact import ExactSearch, NeighborGraph
from data.neighbors.ivf import IVFSearch
from data.stores.claims import Claims, wait_for_lock
from data.stores.files import WORK, appearing, disk_errors, write_json
from data.stores.shards import MANIFEST, agree_on_settings
from data.stores.store import Store, contents_digest, read_manifest

IDS, SIMILARITIES, PARTS = "ids.npy", "similarities.npy", "parts"
PART, BLOCK, SAMPLE = 16_384, 1024, 1000


def build_graph(
    features: Path,
    out: Path,
    neighbors: int,
    method: Literal["exact", "ivf"],
    probes: int,
    precision: Literal["bf16", "fp32"],
    device: torch.device,
    process: int = 0,
    processes: int = 1,
) -> None:
    """Find the `neighbors` nearest to every image, in parts that processes share; the last one to finish joins them."""
    with disk_errors(out):
        _build_graph(features, out, neighbors, method, probes, precision, device, process, processes)


def _build_graph(
    features: Path,
    out: Path,
    neighbors: int,
    method: str,
    probes: int,
    precision: Literal["bf16", "fp32"],
    device: torch.device,
    process: int,
    processes: int,
) -> None:
    manifest = read_manifest(features, "features", "tools/precompute_features.py")
    n = manifest["images"]
    if not 1 <= neighbors < n:
        raise DataError(f"--neighbors {neighbors}: must be from 1 to {n - 1}, one less than there are images")
    settings = {
        "name": manifest["settings"].get("name"),
        "keys": manifest["keys"],
        "features": contents_digest(manifest),
        "neighbors": neighbors,
        "method": method if method == "exact" else f"ivf, {probes} probes",
    }
    agree_on_settings(out, settings)
    if (out / MANIFEST).is_file():
        _tidy(out)
        return
    parts = [f"{part:06d}.npz" for part in range(-(-n // PART))]
    rows = Store(features, manifest).read("feature", np.arange(n))
    exact = ExactSearch(rows, device, precision)
    search = exact if method == "exact" else IVFSearch(rows, probes, exact)
    claims = Claims(out / PARTS, parts, process * len(parts) // processes, complete=out / MANIFEST)
    ready = min(n, PART * sum((out / PARTS / name).exists() for name in parts))
    with tqdm(desc="neighbors", unit="img", total=n, initial=ready, mininterval=0.5) as bar:
        for part in claims:
            ids, similarities = [], []
            for start in range(part * PART, min((part + 1) * PART, n), BLOCK):
                block = np.arange(start, min(start + BLOCK, (part + 1) * PART, n))
                found, cosine = search.nearest(block, neighbors)
                ids.append(found)
                similarities.append(round_down(cosine))
                bar.update(len(block))
            with appearing(out / PARTS / parts[part]) as file:
                np.savez(file, ids=np.concatenate(ids), similarities=np.concatenate(similarities))
            claims.release(part)
    if (out / MANIFEST).is_file() or all((out / PARTS / name).exists() for name in parts):
        with wait_for_lock(out, MANIFEST):
            if not (out / MANIFEST).is_file():
                recall = _join(out, n, neighbors, parts, exact)
                write_json(out / MANIFEST, {"kind": "neighbors", "images": n, "recall": recall, "settings": settings})
        _tidy(out)


def _tidy(out: Path) -> None:
    for folder in (PARTS, WORK):
        shutil.rmtree(out / folder, ignore_errors=True)


def open_graph(folder: Path) -> tuple[NeighborGraph, dict]:
    """Return a memory-mapped graph and its manifest. Raise DataError if it is missing or incomplete."""
    manifest = read_manifest(folder, "neighbors", "tools/build_neighbors.py")
    return NeighborGraph(*(np.load(folder / name, mmap_mode="r") for name in (IDS, SIMILARITIES))), manifest


def round_down(values: np.ndarray) -> np.ndarray:
    """Return float64 values as float16, never above the value."""
    nearest = values.astype(np.float16)
    return np.where(nearest > values, np.nextafter(nearest, np.float16(-np.inf)), nearest)


def _join(out: Path, n: int, neighbors: int, parts: list[str], exact: ExactSearch) -> float:
    """Write the two arrays. Return the recall: the share of the true neighbours of some images that were found."""
    for name, entry, dtype in ((IDS, "ids", np.int32), (SIMILARITIES, "similarities", np.float16)):
        with appearing(out / name) as file:  # not a memory map, for which a full disk is a bus error
            header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (n, neighbors)}
            np.lib.format.write_array_header_1_0(file, header)
            for part in parts:
                with np.load(out / PARTS / part) as stored:
                    file.write(stored[entry].astype(dtype).tobytes())
    sample = np.random.default_rng(0).permutation(n)[:SAMPLE]
    true, _ = exact.nearest(sample, neighbors)
    hits = (np.load(out / IDS, mmap_mode="r")[sample][:, :, None] == true[:, None]).any(axis=2)
    return float(hits.mean())
