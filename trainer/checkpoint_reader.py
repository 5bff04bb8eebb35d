"""Reading a checkpoint in one pass: its files are summed while what they hold goes into the tensors."""

import io
import pickle
import struct
import zipfile
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import is_dataclass, replace
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from isal.isal_zlib import crc32
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from trainer.checkpoint_files import Sums, check_size, check_sum, cut, read_ahead
from trainer.errors import RunError, first_line

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


class Reader(dcp.FileSystemReader):
    """DCP's reader, whose pickled index may name nothing but the classes that an index consists of.

    Each of `files`, a manifest's, is read and summed whole by one of the ranks: Damaged if it is not as it was written.
    """

    def __init__(self, path: Path, files: Sums | None = None) -> None:
        super().__init__(path)
        self._files = files or {}
        self._layouts: dict[bytes, tuple] = {}
        self._index: Metadata | None = None

    def read_metadata(self, *args: object, **kwargs: object) -> Metadata:
        """The index. RunError if it is none, or names anything else: unpickling that would execute code."""
        self._index = self._index or self._read_index()
        self._index.storage_meta.load_id = self.load_id  # a new one each time that something is loaded
        return self._index

    def _read_index(self) -> Metadata:
        path = Path(self.path) / ".metadata"
        with path.open("rb") as file:
            try:
                metadata = _IndexUnpickler(file).load()
                metadata.storage_meta.load_id = None  # it has one
            except OSError:
                raise
            except Exception as error:  # at foreign bytes an unpickler raises whatever it likes
                says = error if isinstance(error, RunError) else f"no index of a checkpoint ({first_line(error)})"
                raise RunError(f"{path}: {says}; use another checkpoint") from None
        return metadata

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Which rank sums which files: each the one that has least to read then."""
        needs = [Counter() for _ in plans]
        for need, plan in zip(needs, plans, strict=True):
            for place in {self._place(item) for item in plan.items}:
                need[place[0]] += place[2] - place[1]
        work, summed = [need.total() for need in needs], [[] for _ in plans]
        for name, (size, _) in sorted(self._files.items(), key=lambda file: -file[1][0]):
            rank = min(range(len(plans)), key=lambda rank: work[rank] - needs[rank][name])
            work[rank] += 2 * size - needs[rank][name]  # to sum is work as well
            summed[rank].append(name)
        return [replace(plan, storage_data=names) for plan, names in zip(plans, summed, strict=True)]

    def _place(self, item: ReadItem) -> tuple[str, int, int]:
        """(file, start, stop) of what is stored."""
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
        file, total, wrong = Path(self.path) / name, 0, None
        if summed:
            check_size(file, self._files[name][0])
        spans, left = cut(list(parts), file.stat().st_size), deque(parts.items())
        if not summed:
            spans = [span for span in spans if any(span[0] <= start < span[1] for start, _ in parts)]
        with ThreadPoolExecutor(1) as adder:
            for start, content in read_ahead(file, spans):
                adding = adder.submit(crc32, content, total) if summed else None
                while left and left[0][0][0] < start + len(content) and not wrong:
                    (first, last), items = left.popleft()
                    try:
                        stored = self._tensor(content[first - start : last - start])
                        for item in items:
                            self._fill(item, stored, planner)
                    except Exception as error:
                        wrong = error  # of a damaged file, the checksum says it better
                total = adding.result() if adding else 0
        if summed:
            check_sum(file, total, self._files[name][1])
        if wrong:
            raise wrong

    def _fill(self, item: ReadItem, stored: Tensor, planner: LoadPlanner) -> None:
        for dimension, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
            stored = stored.narrow(dimension, start, length)
        target = planner.resolve_tensor(item).detach()
        if target.shape != stored.shape:
            raise ValueError(f"{item.storage_index.fqn} is {tuple(stored.shape)}, should be {tuple(target.shape)}")
        target.copy_(stored)
        planner.commit_tensor(item, target)

    def _tensor(self, content: memoryview) -> Tensor:
        """What torch.save wrote, in the memory of the content. What stands before the numbers is the same for all
        tensors of a kind: torch.load, which takes its time, reads the first of each."""
        for length in {len(before) for before in self._layouts}:
            if layout := self._layouts.get(bytes(content[:length])):
                break
        else:
            length, layout = _layout(content)
            self._layouts[bytes(content[:length])] = layout
        dtype, count, *view = layout
        numbers = (
            torch.frombuffer(content, dtype=dtype, count=count, offset=length) if count else torch.empty(0, dtype=dtype)
        )
        return numbers.as_strided(*view)


def _layout(content: memoryview) -> tuple[int, tuple]:
    """Of a tensor that torch.save wrote: where its numbers begin, and (dtype, how many, size, stride, offset)."""
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
            return found.__new__(found, *arguments) if is_dataclass(found) else found(*arguments)

        # what makes such objects, not the class itself: a pickle can also set attributes of a class that it gets
        return type(name, (), {"__new__": make})
