"""The image sets by name, the config that chooses one, and functions that open it.

To add a set, write a file that returns an Images (data/sets/images.py) and add a line to SETS.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

from pydantic import BaseModel, Field, model_validator

from data.errors import DataError
from data.sets import digits, glyphs
from data.sets.arrays import ArrayImages
from data.sets.images import Images
from data.sets.latents import Latents
from data.sets.pixels import Pixels
from data.sets.streamed_latents import StreamedLatents

Split = Literal["train", "heldout"]


class DataConfig(
    BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True, json_schema_extra={"sampling": "also"}
):
    """Which images to train on, and how to read them. Given `channels`, `side` and `scaling` must match the latents or
    pixels; null accepts any."""

    name: str = Field("digits", json_schema_extra={"keys_of": "data.sets.registry:SETS"})
    """The kind of images: digits and glyphs are built in; latents and pixels are read from a folder."""
    latents: str | None = Field(None, json_schema_extra={"path": True})
    """Folder made by tools/precompute_latents.py or tools/cluster_latents.py. Required by name=latents."""
    pixels: str | None = Field(None, json_schema_extra={"path": True})
    """Folder made by tools/precompute_pixels.py. Required by name=pixels."""
    neighbors: str | None = Field(None, json_schema_extra={"path": True})
    """Folder made by tools/build_neighbors.py from the same images. Required by groups.query=similarity, except when
    streaming."""
    channels: int | None = Field(None, ge=1)
    """Channels that a latent or an image must have. null: whatever the folder holds."""
    side: int | None = Field(None, ge=1)
    """Side that a latent (in its own pixels) or an image must have. null: whatever the folder holds."""
    scaling: float | None = Field(None, gt=0)
    """Factor by which the VAE's latents must be scaled. null: whatever the folder holds."""
    flip: bool = True
    """Whether to mirror half of the latents or pixels, chosen at random."""
    vae: str | None = Field(None, json_schema_extra={"path": True})
    """Folder or name of the VAE that decodes samples. null: the one named by the latents."""
    streaming: bool = False
    """Whether to read whole shards in turn instead of single images, for storage that is slow at random reads."""
    window: int = Field(8, ge=1)
    """Of streaming: number of shards that a rank holds in memory and forms groups in."""
    workers: int = Field(0, ge=0, json_schema_extra={"may_change": True, "affects_results": False})
    """Processes per rank that prepare batches. 0: the training process prepares them itself."""

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        if self.name not in SETS:
            *others, last = map(repr, SETS)
            raise ValueError(f"name={self.name}: input should be {', '.join(others)} or {last}")
        tool = SETS[self.name].made_by
        if tool and not getattr(self, self.name):
            raise ValueError(f"{self.name}=null: name={self.name} needs a folder made by {tool}")
        for field in dict.fromkeys(field for known in SETS.values() for field in known.fields):
            value, names = getattr(self, field), [name for name, known in SETS.items() if field in known.fields]
            if value and self.name not in names:
                raise ValueError(f"{field}={value}: is for name={' or '.join(names)}; set that, or leave {field} out")
        return self


class ImageSet(NamedTuple):
    """How to open an image set, and which config fields it has."""

    open: Callable[[DataConfig, Split], Images]
    heldout: bool = False  # whether it has images that training never sees; the evaluation reads them as arrays
    halves: Callable[[DataConfig], tuple[ArrayImages, ArrayImages]] | None = None  # see open_halves; None: not possible
    fields: tuple[str, ...] = ()  # fields of DataConfig that only some sets have
    made_by: str | None = None  # the tool that makes its folder, which is in the config field named like the set


def _open_latents(config: DataConfig, split: Split) -> Images:
    expected = {"channels": config.channels, "side": config.side, "scaling": config.scaling}
    folder = str(config.latents)
    if config.streaming:
        return StreamedLatents(folder, config.vae, config.flip, expected, config.window)
    return Latents(folder, config.neighbors, config.vae, config.flip, expected)


def _open_pixels(config: DataConfig, split: Split = "train") -> Pixels:
    expected: dict[str, float | None] = {"channels": config.channels, "side": config.side}
    return Pixels(str(config.pixels), config.neighbors, config.flip, expected)


def in_memory(load: Callable[[Split], ArrayImages]) -> ImageSet:
    """Return an image set in memory, given `load`, which returns the images of a split."""
    return ImageSet(
        lambda config, split: load(split), heldout=True, halves=lambda config: (load("train"), load("heldout"))
    )


SETS: dict[str, ImageSet] = {
    "digits": in_memory(lambda split: ArrayImages(*digits.load(split))),
    "glyphs": in_memory(lambda split: ArrayImages(*glyphs.load(split))),
    "latents": ImageSet(
        _open_latents,
        fields=("latents", "neighbors", "channels", "side", "scaling", "vae", "streaming"),
        made_by="tools/precompute_latents.py",
    ),
    "pixels": ImageSet(
        _open_pixels,
        halves=lambda config: _open_pixels(config).halves(),
        fields=("pixels", "neighbors", "channels", "side"),
        made_by="tools/precompute_pixels.py",
    ),
}


def open_images(config: DataConfig, split: Split = "train") -> Images:
    """Open the images of a config; "heldout": those that training never sees. Raise DataError if there are none."""
    chosen = SETS[config.name]
    if split == "heldout" and not chosen.heldout:
        raise DataError(f"data.name={config.name}: has no held-out images")
    return chosen.open(config, split)


def open_halves(config: DataConfig) -> tuple[ArrayImages, ArrayImages]:
    """Return real images to train a small classifier on, and others to compare samples to, in memory. If a set has
    held-out images, they are the others; a store of pixels is split in two. Raise DataError if neither is possible."""
    halves = SETS[config.name].halves
    if not halves:
        raise DataError(f"data.name={config.name}: has no held-out images")
    return halves(config)
