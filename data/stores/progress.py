"""Progress of a store, over all processes that make it."""

import json
from pathlib import Path

from tqdm import tqdm

from data.stores.shards import record_of


class Progress:
    """A progress bar over the images of all processes: this one's as they come, those of others by whole shards."""

    def __init__(self, kind: str, images: int | None, shards: list[Path]) -> None:
        self._images, self._shards, self._waiting = images, len(shards), set(shards)
        self._mine: dict[Path, int] = {}
        self._ready, self._rejected = 0, 0
        self._look_for_shards()
        self._bar = tqdm(desc=kind, unit="img", initial=self._ready, total=images, mininterval=0.5)
        self.done(None, 0)

    def done(self, shard: Path | None, images: int) -> None:
        """Count more images of a shard that this process is making."""
        if shard:
            self._mine[shard] = self._mine.get(shard, 0) + images
        ready = self._shards - len(self._waiting)
        if self._images is None and ready:
            self._bar.total = round(self._ready / ready * self._shards)  # the size of tar shards is known once read
        self._bar.set_postfix(rejected=self._rejected, refresh=False)
        self._bar.update(self._ready + sum(self._mine.values()) - self._bar.n)

    def _look_for_shards(self) -> None:
        for shard in [shard for shard in self._waiting if shard.exists()]:
            record = json.loads(record_of(shard).read_text())
            self._ready += record["images"] + len(record["rejected"])
            self._rejected += len(record["rejected"])
            self._mine.pop(shard, None)
            self._waiting.remove(shard)

    def shard_written(self) -> None:
        """Count the shards that now exist."""
        self._look_for_shards()
        self.done(None, 0)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
