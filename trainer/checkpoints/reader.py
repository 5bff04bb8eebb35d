"""Read a checkpoint in one pass: its files are checksummed while their content goes into the tensors."""

import io
import pickle
import struct
import zipfile
from collections import Counter
from dataclasses import is_dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from trainer.checkpoints.files import Source, Sums, check_size, check_sum
from trainer.errors import RunError, first_line

HEAD = 1 << 16  # bytes of a stored tensor read first: more than precede its numbers
_METADATA = "torch.distributed.checkpoint.metadata"
_INDEX_CLASSES = {
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
    ("torch", "Size"),
    ("torch", "bfloat16"),
    ("torch", "float32"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    (_METADATA, "ChunkStorageMetadata"),
    (_METADATA, "Metadata"),
    (_METADATA, "MetadataIndex"),
    (_METADATA, "StorageMeta"),
    (_METADATA, "TensorProperties"),
    (_METADATA, "TensorStorageMetadata"),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
}


class Reader(FileSystemReader):
    """DCP's reader, whose pickled index may name only the classes that an index consists of.

    Each of the manifest's `files` is read and checksummed whole by one rank: Damaged if it is not as it was written.
    """

    def __init__(self, path: Path, files: Sums | None = None) -> None:
        super().__init__(path)
        self._files = files or {}
        self._layouts: dict[bytes, tuple] = {}
        self._index: Metadata | None = None

    def read_metadata(self, *args: object, **kwargs: object) -> Metadata:
        """Return the index. Raise RunError if it is none, or names other classes: unpickling those would run code."""
        self._index = self._index or self._read_index()
        assert self._index.storage_meta is not None  # _read_index has set a field of it
        self._index.storage_meta.load_id = self.load_id  # a new one for each load
        return self._index

    def _read_index(self) -> Metadata:
        path = Path(self.path) / ".metadata"
        with path.open("rb") as file:
            try:
                metadata = _IndexUnpickler(file).load()
                metadata.storage_meta.load_id = None  # fails if there is no storage_meta
            except OSError:
                raise
            except Exception as error:  # an unpickler may raise anything at foreign bytes
                says = error if isinstance(error, RunError) else f"no index of a checkpoint ({first_line(error)})"
                raise RunError(f"{path}: {says}; use another checkpoint") from None
        return metadata

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Decide which rank checksums which files: each goes to the rank that then has the least to read."""
        needs = [Counter() for _ in plans]
        for need, plan in zip(needs, plans, strict=True):
            for place in {self._place(item) for item in plan.items}:
                need[place[0]] += place[2] - place[1]
        work, summed = [need.total() for need in needs], [[] for _ in plans]
        for name, (size, _) in sorted(self._files.items(), key=lambda file: -file[1][0]):
            rank = min(range(len(plans)), key=lambda rank: work[rank] - needs[rank][name])
            work[rank] += 2 * size - needs[rank][name]  # checksumming is work as well
            summed[rank].append(name)
        return [replace(plan, storage_data=names) for plan, names in zip(plans, summed, strict=True)]

    def _place(self, item: ReadItem) -> tuple[str, int, int]:
        """Return where an item is stored: (file, start, stop)."""
        stored = self.storage_data[item.storage_index]
        return stored.relative_path, stored.offset, stored.offset + stored.length

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill the tensors of the plan."""
        wanted: dict[str, dict[tuple[int, int], list[ReadItem]]] = {name: {} for name in plan.storage_data}
        for item in plan.items:
            name, start, stop = self._place(item)
            wanted.setdefault(name, {}).setdefault((start, stop), []).append(item)
        for name, parts in sorted(wanted.items()):
            self._read_file(name, dict(sorted(parts.items())), name in plan.storage_data, planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read_file(
        self, name: str, parts: dict[tuple[int, int], list[ReadItem]], summed: bool, planner: LoadPlanner
    ) -> None:
        file, wrong = Path(self.path) / name, None
        size, checksum = self._files[name] if summed else (0, 0)
        if summed:
            check_size(file, size)
        edges = [0, *(edge for part in parts for edge in part), file.stat().st_size]
        if edges != sorted(edges):
            raise ValueError("what is stored overlaps, or lies behind the end of the file")
        with file.open("rb", buffering=0) as stream:
            source = Source(stream, summed)
            try:
                for (start, stop), items in parts.items():
                    source.pass_to(start)
                    self._read_part(source, stop, items, planner)
            except Exception as error:
                wrong = error  # if the file is damaged, the checksum says so better
            if summed:
                source.pass_to(size)
                check_sum(file, source.checksum, checksum)
        if wrong:
            raise wrong

    def _read_part(self, source: Source, stop: int, items: list[ReadItem], planner: LoadPlanner) -> None:
        """Fill the items of a stored tensor. A large one that is wanted as stored is read directly into its target."""
        content = torch.empty(stop - source.position, dtype=torch.uint8).numpy().data
        source.read_into(content[:HEAD])
        target = planner.resolve_tensor(items[0]).detach()
        whole = len(items) == 1 and items[0].lengths == target.shape
        rest = self._rest(content[:HEAD], target) if whole and len(content) > HEAD else None
        if rest is not None:
            source.read_into(rest)
            source.pass_to(stop)
            planner.commit_tensor(items[0], target)
            return
        source.read_into(content[HEAD:])
        stored = self._tensor(content)
        for item in items:
            self._fill(item, stored, planner)

    def _rest(self, head: memoryview, target: Tensor) -> memoryview | None:
        """If the target is laid out like the stored tensor, fill it from `head` and return its memory for the rest."""
        length, layout = self._known(head) or (0, None)
        if layout != (target.dtype, target.numel(), target.shape, target.stride(), 0):
            return None
        if target.device.type != "cpu" or not target.is_contiguous():
            return None
        numbers = target.reshape(-1).view(torch.uint8).numpy().data
        first = head[length : length + len(numbers)]
        numbers[: len(first)] = first
        return numbers[len(first) :]

    def _fill(self, item: ReadItem, stored: Tensor, planner: LoadPlanner) -> None:
        for dimension, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
            stored = stored.narrow(dimension, start, length)
        target = planner.resolve_tensor(item).detach()
        if target.shape != stored.shape:
            raise ValueError(f"{item.storage_index.fqn} is {tuple(stored.shape)}, should be {tuple(target.shape)}")
        target.copy_(stored)
        planner.commit_tensor(item, target)

    def _tensor(self, content: memoryview) -> Tensor:
        """Return the tensor that torch.save wrote, in the memory of `content`. What precedes the numbers is the same
        for all tensors of a kind: torch.load, which is slow, reads only the first of each."""
        known = self._known(content)
        if known is None:
            known = _layout(content)
            self._layouts[bytes(content[: known[0]])] = known[1]
        length, (dtype, count, *view) = known
        numbers = (
            torch.frombuffer(content, dtype=dtype, count=count, offset=length) if count else torch.empty(0, dtype=dtype)
        )
        return numbers.as_strided(*view)

    def _known(self, content: memoryview) -> tuple[int, tuple] | None:
        """Return the _layout of earlier content that began with the same bytes, if any."""
        for length in {len(before) for before in self._layouts}:
            if layout := self._layouts.get(bytes(content[:length])):
                return length, layout
        return None


def _layout(content: memoryview) -> tuple[int, tuple]:
    """Return where the numbers of a tensor that torch.save wrote begin, and (dtype, count, size, stride, offset)."""
    tensor = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    if not isinstance(tensor, Tensor):
        raise ValueError(f"no tensor, but {type(tensor).__name__}")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        header = next(one.header_offset for one in archive.infolist() if one.filename.endswith("/data/0"))
    start = header + 30 + sum(struct.unpack_from("<HH", content, header + 26))  # 4.3.7 in PKWARE's APPNOTE
    count = tensor.untyped_storage().nbytes() // tensor.itemsize
    return start, (tensor.dtype, count, tensor.shape, tensor.stride(), tensor.storage_offset())


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in _INDEX_CLASSES:
            raise RunError(f"refused, for {module}.{name} in it would execute code")
        found = super().find_class(module, name)
        if not callable(found):
            return found

        def make(_: type, *arguments: object) -> object:
            if isinstance(found, type) and is_dataclass(found):
                return found.__new__(found, *arguments)
            return found(*arguments)

        # return a function that makes such objects, not the class: a pickle could set attributes of the class
        return type(name, (), {"__new__": make})
