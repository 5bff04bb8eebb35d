"""Finished images to be measured: a .npz file of samples, or a folder of image files or of WebDataset tar shards."""

import hashlib
import os
import zipfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.lib import format as npy

from data.extraction.crop import center_crop, decode_rgb
from data.extraction.sources import EXTENSIONS, Item, list_source
from data.stores.files import sha256
from trainer.errors import RunError, first_line

ARRAY, LABELS = "arr_0", "arr_1"  # the keys of images and classes in ADM's suite
THREADS = min(8, os.cpu_count() or 1)  # threads that read and decode


class ImageSet(Protocol):
    """Images, read by number."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """H, W, C of an image."""
        ...

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return images `start` to `stop` as uint8 (stop - start, H, W, C). Raise RunError if one cannot be read."""
        ...


class StoredImages(ImageSet, Protocol):
    """Images stored in files."""

    def checksum(self) -> str:
        """Return the SHA-256 of the files' content."""
        ...

    def labels(self) -> np.ndarray | None:
        """Return the images' classes (n,), if they are there."""
        ...


class ArrayFile:
    """`arr_0` (n, H, W, C) uint8 of an .npz file; read in pieces if it is not compressed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_npz(path) as archive:
            if ARRAY not in archive.files:
                raise RunError(f"{path}: no {ARRAY} in it, only {', '.join(archive.files)}; put the images there")
            assert archive.zip is not None  # it is open
            self._offset, shape, dtype, fortran = _place(archive.zip, path)
            if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or not all(shape):
                raise RunError(
                    f"{path}: {ARRAY} {_describe(archive, shape, dtype)}; give uint8 (n, H, W, 1 or 3), 0 to 255"
                )
            self._whole = archive[ARRAY] if fortran or self._offset is None else None
        self._number, height, width, channels = shape
        self.shape = height, width, channels

    def __len__(self) -> int:
        return self._number

    def read(self, start: int, stop: int) -> np.ndarray:
        """As ImageSet.read."""
        if self._whole is not None:
            return self._whole[start:stop]
        assert self._offset is not None  # else the whole is in memory
        size = int(np.prod(self.shape))
        with self.path.open("rb") as file:  # not a memory map: its pages count as this process's memory
            file.seek(self._offset + start * size)
            found = np.fromfile(file, np.uint8, (stop - start) * size)
        if found.size < (stop - start) * size:
            raise RunError(f"{self.path}: ends in the middle of {ARRAY}; make it again")
        return found.reshape(-1, *self.shape)

    def checksum(self) -> str:
        """Return the SHA-256 of the file."""
        return sha256(self.path)

    def labels(self) -> np.ndarray | None:
        """Return `arr_1` (n,), as in the files of tools/sample.py."""
        with open_npz(self.path) as archive, suppress(KeyError, ValueError):  # not there, or of objects
            label = archive[LABELS]
            return label if label.shape == (self._number,) else None


class Pictures:
    """Image files in order of their names. With a `side`, they are centre-cropped as in ADM; else all have one size."""

    def __init__(self, path: Path, items: list[Item], side: int | None) -> None:
        self.path, self._items, self._side = path, items, side
        height, width = (side, side) if side else self._decode(items[0]).shape[:2]
        self.shape = height, width, 3

    def __len__(self) -> int:
        return len(self._items)

    def read(self, start: int, stop: int) -> np.ndarray:
        """As ImageSet.read."""
        found = [self._decode(item) for item in self._items[start:stop]]
        for item, image in zip(self._items[start:stop], found, strict=True):
            if image.shape != self.shape:
                size, others = (f"{width}x{height}" for height, width, _ in (image.shape, self.shape))
                raise RunError(f"{_name(item)}: {size} pixels, others have {others}; give one size")
        return np.stack(found)

    def checksum(self) -> str:
        """Return the SHA-256 of the names and contents of all files."""
        digest = hashlib.sha256()
        for item in self._items:
            digest.update(f"{item.key} {hashlib.sha256(item.read()).hexdigest()}\n".encode())
        return digest.hexdigest()

    def labels(self) -> np.ndarray | None:
        """Return the number of each image's folder."""
        return np.unique([item.key.rpartition("/")[0] for item in self._items], return_inverse=True)[1]

    def _decode(self, item: Item) -> np.ndarray:
        try:
            image = decode_rgb(item.read())
        except Exception as error:  # Pillow may raise anything at a damaged file
            raise RunError(f"{_name(item)}: cannot be read as an image: {first_line(error)}; remove it") from None
        return center_crop(image, self._side) if self._side else np.asarray(image)


def open_image_set(path: Path, side: int | None = None) -> StoredImages:
    """Return the images at `path`; those of a folder cropped to `side` pixels. Raise RunError if there are none, or
    they are of another kind."""
    if path.is_file():
        return ArrayFile(path)
    if not path.is_dir():
        raise RunError(f"{path}: not there; give an .npz file with {ARRAY}, or a folder of images")
    items = _tarred(path) if any(path.glob("*.tar")) else _files(path)
    if not items:
        raise RunError(
            f"{path}: no images in it ({', '.join(sorted(EXTENSIONS))}); give another folder, or an .npz file"
        )
    return Pictures(path, items, side)


def open_npz(path: Path) -> np.lib.npyio.NpzFile:
    """Open an .npz file. Raise RunError if it is not one."""
    try:
        archive = np.load(path)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise RunError(
            f"{path}: cannot be read: {first_line(error)}; give an .npz file, or a folder of images"
        ) from None
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise RunError(
            f"{path}: one array without a name; save it by numpy.savez(file, images), which calls it {ARRAY}"
        )
    return archive


def read_ahead(images: ImageSet, pieces: list[tuple[int, int]]) -> Iterator[np.ndarray]:
    """Yield `images.read` of each (start, stop), in order; threads read several at once, ahead of use."""
    with ThreadPoolExecutor(THREADS) as pool:
        waiting = deque(pool.submit(images.read, *piece) for piece in pieces[: 2 * THREADS])
        try:
            for number in range(len(pieces)):
                yield waiting.popleft().result()
                if (further := number + 2 * THREADS) < len(pieces):
                    waiting.append(pool.submit(images.read, *pieces[further]))
        finally:
            for future in waiting:
                future.cancel()


def _files(root: Path) -> list[Item]:
    found = sorted(path for path in root.rglob("*") if path.suffix.lower().lstrip(".") in EXTENSIONS)
    return [Item(path.relative_to(root).as_posix(), None, path) for path in found]


def _tarred(root: Path) -> list[Item]:
    source = list_source(root, 1)
    return [item for part in range(source.parts) for item in source.items(part)]


def _name(item: Item) -> str:
    return f"{item.file} ({item.key})" if item.size is not None else str(item.file)


def _place(archive: zipfile.ZipFile, path: Path) -> tuple[int | None, tuple[int, ...], np.dtype, bool]:
    """Return where arr_0's numbers begin in the file (None: compressed), shape, type, and whether in Fortran order."""
    member = archive.getinfo(f"{ARRAY}.npy")
    with archive.open(member) as file:
        version = npy.read_magic(file)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran, dtype = read(file)
        header = file.tell()
    if member.compress_type != zipfile.ZIP_STORED:
        return None, shape, dtype, fortran
    with path.open("rb") as file:
        file.seek(member.header_offset + 26)  # in the local file header: the lengths of name and extra field
        lengths = np.frombuffer(file.read(4), "<u2").astype(int)
    return member.header_offset + 30 + int(lengths.sum()) + header, shape, dtype, fortran


def _describe(archive: np.lib.npyio.NpzFile, shape: tuple[int, ...], dtype: np.dtype) -> str:
    found = f"is {dtype} {shape}"
    if dtype.kind == "f" and all(shape):
        values = archive[ARRAY]
        found += f" from {values.min():.3g} to {values.max():.3g}"
    return found
