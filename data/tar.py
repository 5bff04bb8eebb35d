"""Where the members of a tar shard are, so that they can be read at their offsets."""

import tarfile
from collections.abc import Iterator
from pathlib import Path


def tar_samples(path: Path) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """(key, {extension: (offset in bytes, size)}) of each sample, in the file's order. As webdataset has it, the key is
    a member's name up to the first dot of its last part, and neighbours with one key are one sample.

    tarfile.TarError if the file was cut off.
    """
    key, members = "", {}
    with tarfile.open(path, "r:") as tar:
        end = 0
        for member in tar:
            if not member.isfile():
                continue
            end = member.offset_data + member.size
            folder, slash, name = member.name.rpartition("/")
            stem, _, extension = name.partition(".")
            if folder + slash + stem != key or extension.lower() in members:
                if members:
                    yield key, members
                key, members = folder + slash + stem, {}
            members[extension.lower()] = (member.offset_data, member.size)
        if end > path.stat().st_size:
            raise tarfile.ReadError("unexpected end of data")
    if members:
        yield key, members
