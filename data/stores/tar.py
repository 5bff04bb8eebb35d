"""The places of the members of a tar shard, so that they can be read at their offsets."""

import tarfile
from collections.abc import Iterator
from pathlib import Path


def tar_samples(path: Path) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """Yield (key, {extension: (offset in bytes, size)}) of each sample, in the file's order. As in webdataset, the key
    is a member's name up to the first dot of its last part, and adjacent members with the same key are one sample.

    Raise tarfile.TarError if the file was cut off or a header is damaged.
    """
    key, members = "", {}
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            if not member.isfile():
                continue
            folder, slash, name = member.name.rpartition("/")
            stem, _, extension = name.partition(".")
            if folder + slash + stem != key or extension.lower() in members:
                if members:
                    yield key, members
                key, members = folder + slash + stem, {}
            members[extension.lower()] = (member.offset_data, member.size)
        with path.open("rb") as file:  # at a damaged or missing header, tarfile ends silently
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"no header and no end at byte {tar.offset}")
    if members:
        yield key, members
