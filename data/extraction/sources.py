"""Images to precompute from: a tree of class folders, or WebDataset tar shards, in parts that processes share."""

import json
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from data.errors import DataError
from data.stores.claims import wait_for_lock
from data.stores.files import write_json
from data.stores.tar import tar_samples

EXTENSIONS = {"bmp", "jpeg", "jpg", "pgm", "png", "ppm", "tif", "tiff", "webp"}


@dataclass(frozen=True)
class Item:
    """One image: `size` bytes of `file` starting at `offset` (None: to the end). `label` is None if the source has none
    for it."""

    key: str
    label: int | None
    file: Path
    offset: int = 0
    size: int | None = None

    def read(self) -> bytes:
        """Return the content of the image file."""
        with self.file.open("rb") as file:
            file.seek(self.offset)
            return file.read() if self.size is None else file.read(self.size)


class Parts(Protocol):
    """Images in a fixed order, cut into parts."""

    @property
    def parts(self) -> int:
        """Number of parts."""
        ...

    def items(self, part: int) -> list[Item]:
        """Return the images of a part."""
        ...


class Source(Parts, Protocol):
    """Image files to make a store from; a part becomes a shard."""

    @property
    def images(self) -> int | None:
        """Number of images. None: known only once all parts have been read."""
        ...

    @property
    def num_classes(self) -> int | None:
        """Number of classes. None: as many as the labels need."""
        ...

    def listing(self) -> dict:
        """Return what `open_source` needs to reopen the same source, as JSON."""
        ...


class ClassFolders:
    """Files `root/class/.../image.jpg`: a label is the number of a class folder in sorted order, a key is a path
    without its extension."""

    def __init__(self, root: Path, classes: list[str], files: list[str], part_size: int) -> None:
        self.root, self.classes, self.files, self.part_size = root, classes, files, part_size
        self.parts = -(-len(files) // part_size)
        self.images, self.num_classes = len(files), len(classes)
        self._label = {name: i for i, name in enumerate(classes)}

    def items(self, part: int) -> list[Item]:
        """Return the images of a part: `part_size` files of the sorted listing."""
        files = self.files[part * self.part_size : (part + 1) * self.part_size]
        return [Item(key_of(file), self._label[file.split("/", 1)[0]], self.root / file) for file in files]

    def listing(self) -> dict:
        """Return the names found when the work began."""
        return {"classes": self.classes, "files": self.files}


class TarShards:
    """Files `root/*.tar` of samples `key.jpg` (or another image format) and `key.cls`: a tar file is a part. Its name
    is prepended to its keys, which often start over in each tar file."""

    def __init__(self, root: Path, tars: list[str]) -> None:
        self.root, self.tars = root, tars
        self.parts, self.images, self.num_classes = len(tars), None, None

    def items(self, part: int) -> list[Item]:
        """Return the images of a tar file."""
        path = self.root / self.tars[part]
        items = []
        try:
            with path.open("rb") as file:
                for key, members in tar_samples(path):
                    label = None
                    if "cls" in members:
                        file.seek(members["cls"][0])
                        text = file.read(members["cls"][1]).strip()
                        label = int(text) if text.isdigit() and len(text) < 10 else None  # fits in int32
                    image = min(EXTENSIONS & members.keys(), default=None)
                    place = members[image] if image else (0, 0)
                    items.append(Item(f"{path.stem}/{key}", label, path, *place))
        except FileNotFoundError:
            raise DataError(f"{path}: is gone since the work began; put it back") from None
        except tarfile.TarError as error:
            raise DataError(f"{path}: not a whole tar file ({error}); get it again") from None
        return items

    def listing(self) -> dict:
        """Return the names found when the work began."""
        return {"tars": self.tars}


def key_of(file: str) -> str:
    """Return a path without its extension; other dots in its last part are escaped, because webdataset ends a key at
    the first dot."""
    folder, slash, name = file.rpartition("/")
    return folder + slash + name.rpartition(".")[0].replace("%", "%25").replace(".", "%2E")


def list_source(root: Path, part_size: int) -> Source:
    """Return the source in `root`. Raise DataError if it holds no images, or two images with the same key."""
    if not root.is_dir():
        raise DataError(f"--images {root}: no such folder; give a tree of class folders, or a folder of tar shards")
    with os.scandir(root) as entries:
        names = sorted((entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith("."))
    tars = [name for name, is_folder in names if name.endswith(".tar") and not is_folder]
    if tars:
        return TarShards(root, tars)
    classes = [name for name, is_folder in names if is_folder]
    files = [file for name in classes for file in _image_files(root, name)]
    if not files:
        raise DataError(f"--images {root}: neither class folders with images nor *.tar shards in it")
    keys: dict[str, str] = {}
    for file in files:
        other = keys.setdefault(key_of(file), file)
        if other != file:
            raise DataError(f"--images {root}: {other} and {file} have one key, {key_of(file)}; rename one of them")
    return ClassFolders(root, classes, files, part_size)


def open_source(root: Path, listing: dict, part_size: int) -> Source:
    """Return the source that had this `listing`, without searching its folders again."""
    if "tars" in listing:
        return TarShards(root, listing["tars"])
    return ClassFolders(root, listing["classes"], listing["files"], part_size)


def shared_source(root: Path, part_size: int, folder: Path) -> Source:
    """Return the source as it was when the work in `folder` began: the first process lists it, others wait and read the
    list.

    Raise DataError if the work began with another source, or if `folder` would be one of its classes.
    """
    path, images = folder / "inputs.json", str(root.absolute())
    if folder.absolute().is_relative_to(images):
        raise DataError(f"--out {folder}: lies in --images {root} and would be taken for a class; move it out")
    if not path.exists():
        with wait_for_lock(folder, path.name):
            if not path.exists():
                write_json(path, {"images": images, **list_source(root, part_size).listing()})
    listing = json.loads(path.read_text())
    if listing["images"] != images:
        raise DataError(
            f"images={images}: {folder} was begun with images={listing['images']}; set it back, or give another --out"
        )
    return open_source(root, listing, part_size)


def _image_files(root: Path, class_name: str) -> list[str]:
    found = []
    for folder, _, names in os.walk(root / class_name, onerror=_cannot_list, followlinks=True):
        inside = Path(folder).relative_to(root).as_posix()
        found += [f"{inside}/{name}" for name in names if name.rpartition(".")[2].lower() in EXTENSIONS]
    for file in found:
        if not file.isprintable() or file != file.encode(errors="replace").decode():
            raise DataError(f"--images {root}: {file!r} is no name in UTF-8 that can be printed; rename it")
    return sorted(found)


def _cannot_list(error: OSError) -> None:
    raise DataError(f"{error.filename}: cannot be listed: {error.strerror}")
