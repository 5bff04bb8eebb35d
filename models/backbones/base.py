"""What a backbone is, and the config fields that all backbones have."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, Field, model_validator
from torch import Tensor, nn

from models.backbones.attention import ATTENTION
from models.backbones.mlp import MLPS
from models.choice import NameOf

WRAPPERS: dict[str, Callable[[nn.Module, int, "BackboneConfig"], None]] = {}
"""Wrappers of blocks, by their names in `model.wrap`: wrap(block, number of the block, config) may replace
block.forward. Names of parameters stay; engines recompute and compile the wrapped block."""


class BackboneConfig(BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True):
    """The network. `size` sets depth, width, heads and the like; leave it out to set them yourself."""

    sizes: ClassVar[dict[str, dict[str, int]]] = {}  # fields that each published size sets

    backbone: str = Field("dit", json_schema_extra={"keys_of": "models.backbones.registry:BACKBONES"})
    """The network's architecture. SiT is `dit` on the path `linear`."""
    size: str | None = None
    """A published size, which sets depth, width and heads: S, B, L, XL of dit; B, L, H, G of jit. null: set them."""
    depth: int = Field(12, ge=1)
    """Number of transformer blocks."""
    width: int = Field(384, ge=4)
    """Channels of a token; a multiple of `heads` and of 4."""
    heads: int = Field(6, ge=1)
    """Attention heads of a block."""
    patch: int = Field(2, ge=1)
    """Side of a patch, in latent pixels or image pixels; must divide the side of an image."""
    mlp_ratio: float = Field(4.0, gt=0)
    """Hidden width of a block's MLP, as a multiple of `width`."""
    max_group_size: int | None = Field(None, ge=0)
    """Largest group that the network can take: the rows of its sample embedding. 0: no sample embedding, as in plain
    diffusion. null: 0 for groups.variant=none, 16 otherwise."""
    group_layers: tuple[int, ...] | None = Field(None, json_schema_extra={"sampling": "also"})
    """Blocks in which a group shares attention, counted from 0. null: all blocks."""
    time_scale: float = Field(1.0, gt=0)
    """Factor on times in [0, 1] before they are embedded; 1 in SiT and JiT. Must be 1 for path=ddpm."""
    attention: Annotated[str, NameOf(ATTENTION)] = "softmax"
    """How tokens of a group attend to one another."""
    mlp: Annotated[str, NameOf(MLPS)] = "gelu"
    """The MLP of a block: gelu in dit, swiglu in jit."""
    wrap: tuple[Annotated[str, NameOf(WRAPPERS)], ...] = ()
    """Wrappers around each block, the first named innermost."""

    @model_validator(mode="before")
    @classmethod
    def _fill_size(cls, values: Any) -> Any:
        size = values.get("size") if isinstance(values, dict) else None
        if not isinstance(size, str):
            return values
        if size not in cls.sizes:
            known = f"choose of {', '.join(cls.sizes)}, or " if cls.sizes else ""
            raise ValueError(f"size={size}: no such size; {known}give depth, width, heads")
        for name, value in cls.sizes[size].items():
            if values.get(name, value) != value:
                raise ValueError(f"{name}={values[name]}: contradicts size={size} ({name} {value}); set size=null")
        return {**values, **cls.sizes[size]}

    @model_validator(mode="after")
    def _check(self) -> "BackboneConfig":
        if self.width % self.heads or self.width % 4:
            raise ValueError(f"width={self.width}: must be a multiple of heads={self.heads} and of 4")
        for layer in self.group_layers or ():
            if not 0 <= layer < self.depth:
                raise ValueError(f"group_layers={list(self.group_layers or ())}: blocks are 0 to {self.depth - 1}")
        return self

    @property
    def slots(self) -> int:
        """Return the rows of the sample embedding; 0: there is none."""
        return 16 if self.max_group_size is None else self.max_group_size

    def shares(self, layer: int) -> bool:
        """Return whether groups share attention in a block."""
        return self.group_layers is None or layer in self.group_layers


class Backbone(nn.Module, ABC):
    """A network for images (channels, side, side) of `num_classes` classes that predicts `out_channels`. A subclass is
    constructed from (config, channels, side, num_classes, out_channels), freshly initialised.

    Engines shard, compile and recompute `blocks`, and hooks observe them; each returns tokens (B, L, width), the last
    of them the image's patches, row by row. `tokens` is the number of tokens of an image, averaged over blocks, from
    which the memory of activations is estimated. Attention between images uses GroupAttention, which can be observed.
    To one that `takes_keys`, training gives the keys of its images (dropout.image_keys) as a last argument: it drops as
    they tell. Sampling and analyses give none.
    """

    Config: ClassVar[type[BackboneConfig]] = BackboneConfig
    config: BackboneConfig
    out_channels: int
    blocks: nn.ModuleList
    tokens: float
    takes_keys: bool = False

    def __init__(
        self, config: Any, channels: int, side: int, num_classes: int, out_channels: int | None = None
    ) -> None:
        super().__init__()
        if side % config.patch:
            raise ValueError(f"model.patch={config.patch}: must divide the image side {side}")
        self.config, self.out_channels = config, out_channels or channels

    @abstractmethod
    def forward(
        self, x: Tensor, t: Tensor, label: Tensor, slot: Tensor, group_size: int = 1, grouped: int | None = None
    ) -> Tensor:
        """Return the prediction (B, out_channels, side, side) for noisy images x (B, channels, side, side) at times t
        (B,), with class label (B,) (NULL_LABEL: unconditional) and slot (B,) in the group, which only the sample
        embedding looks at.

        Groups are `group_size` contiguous images. The first `grouped` images share attention in their groups (None:
        all), the others attend only to themselves.
        """
