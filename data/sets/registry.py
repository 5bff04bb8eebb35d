"""The images that a run trains on, and where they come from."""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import numpy as np
import torch
from pydantic import BaseModel, Field, model_validator

from data.errors import DataError
from data.neighbors.exact import NeighborGraph, nearest_neighbors
from data.randomness import Draws
from data.sets import digits, glyphs
from data.sets.latents import Latents
from data.sets.pixels import Pixels
from data.sets.streamed_latents import StreamedLatents

ARRAYS = {"digits": digits.load, "glyphs": glyphs.load}  # images that fit in memory
OF_STORES = {
    "latents": ("latents",),
    "pixels": ("pixels",),
    "neighbors": ("latents", "pixels"),
    "channels": ("latents", "pixels"),
    "side": ("latents", "pixels"),
    "scaling": ("latents",),
    "vae": ("latents",),
    "streaming": ("latents",),
}  # fields of DataConfig that not every kind of images has, and the names of those that do


class DataConfig(
    BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True, json_schema_extra={"sampling": "also"}
):
    """Which images, and how they are read. What stands in it of channels, side and scaling must be true of the latents
    or pixels; null accepts whatever they have."""

    name: Literal["digits", "glyphs", "latents", "pixels"] = "digits"
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
    """Whether half of the latents or pixels, at random, are of the mirror image."""
    vae: str | None = Field(None, json_schema_extra={"path": True})
    """Folder or name of the VAE that decodes samples. null: the one that the latents name."""
    streaming: bool = False
    """Whether to read whole shards in turn instead of images at random, for storage that is slow at random reads."""
    window: int = Field(8, ge=1)
    """Of streaming: shards that a rank holds in memory and forms groups in."""
    workers: int = Field(0, ge=0, json_schema_extra={"may_change": True, "affects_results": False})
    """Processes per rank that prepare batches. 0: the training process prepares them itself."""

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        if self.name in ("latents", "pixels") and not getattr(self, self.name):
            tool = f"tools/precompute_{self.name}.py"
            raise ValueError(f"{self.name}=null: name={self.name} needs a folder made by {tool}")
        for field, names in OF_STORES.items():
            value = getattr(self, field)
            if value and self.name not in names:
                raise ValueError(f"{field}={value}: is for name={' or '.join(names)}; set that, or leave {field} out")
        return self


class Images(Protocol):
    """n images by number. `posterior` tells whether an image is a distribution to draw from, `mirrored` whether reading
    it may give its mirror image: `draws` then hold the numbers for that."""

    label: np.ndarray  # (n,) class numbers
    num_classes: int
    shape: tuple[int, int, int]  # C, H, W of one
    posterior: bool
    mirrored: bool
    vae: str | None  # what decodes them; None: they are pixels
    identity: str  # tells these images from others, wherever they lie
    extra: Mapping[str, tuple[int, ...]]  # shapes of further tensors of an image, by their names: for loss terms

    def __len__(self) -> int: ...

    def read(self, numbers: np.ndarray, draws: Draws) -> torch.Tensor:
        """The images `numbers` (b,), (b, C, H, W) float32; what is random about them is in `draws`."""

    def read_extra(self, numbers: np.ndarray, draws: Draws, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
        """The tensors `names`, all in `extra`, of the images `numbers` (b,): (b, *shape) each. They are those of the
        mirror image where `read` gives that."""

    def max_neighbors(self) -> int:
        """How many `neighbors` of each are known. DataError if none."""

    def neighbors(self, k: int) -> NeighborGraph:
        """The k most similar others of each."""


@dataclass(frozen=True)
class ArrayImages:
    """Images in memory: x (n, C, H, W) float32 in [-1, 1], label (n,) int64; `features` (n, d) are what is compared."""

    x: np.ndarray
    label: np.ndarray
    features: np.ndarray
    num_classes: int
    posterior = mirrored = False
    vae = None
    extra: ClassVar[dict[str, tuple[int, ...]]] = {}

    def __len__(self) -> int:
        return len(self.label)

    @property
    def shape(self) -> tuple[int, int, int]:
        """C, H, W."""
        return self.x.shape[1:]

    @property
    def identity(self) -> str:
        """Their checksum."""
        return f"{zlib.crc32(self.x.tobytes()):08x}"

    def read(self, numbers: np.ndarray, draws: Draws) -> torch.Tensor:
        """As they are."""
        return torch.from_numpy(self.x[numbers])

    def max_neighbors(self) -> int:
        """All others."""
        return len(self) - 1

    def neighbors(self, k: int) -> NeighborGraph:
        """By their features."""
        return nearest_neighbors(self.features, k)


def open_images(config: DataConfig, split: Literal["train", "heldout"] = "train") -> Images:
    """The images of a config; "heldout" are those that training never sees. DataError if there are none."""
    if config.name in ARRAYS:
        return ArrayImages(*ARRAYS[config.name](split))
    if split != "train":
        raise DataError(f"data.name={config.name}: has no held-out images")
    expected = {"channels": config.channels, "side": config.side}
    if config.name == "pixels":
        return Pixels(config.pixels, config.neighbors, config.flip, expected)
    expected |= {"scaling": config.scaling}
    if config.streaming:
        return StreamedLatents(config.latents, config.vae, config.flip, expected)
    return Latents(config.latents, config.neighbors, config.vae, config.flip, expected)
