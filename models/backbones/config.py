"""What the config says of the network."""

from typing import Literal

from pydantic import BaseModel, Field, model_validator

SIZES = {
    "dit": {  # table 1 of arXiv 2212.09748
        "S": {"depth": 12, "width": 384, "heads": 6},
        "B": {"depth": 12, "width": 768, "heads": 12},
        "L": {"depth": 24, "width": 1024, "heads": 16},
        "XL": {"depth": 28, "width": 1152, "heads": 16},
    },
    "jit": {  # table 9 of arXiv 2511.13720
        "B": {"depth": 12, "width": 768, "heads": 12, "bottleneck": 128, "context_start": 4},
        "L": {"depth": 24, "width": 1024, "heads": 16, "bottleneck": 128, "context_start": 8},
        "H": {"depth": 32, "width": 1280, "heads": 16, "bottleneck": 256, "context_start": 10},
    },
}


class ModelConfig(BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True):
    """The network. `size` fills depth, width, heads and the like; leave it out to choose them freely."""

    backbone: Literal["dit", "jit"] = "dit"
    """The network's architecture. SiT is `dit` on the path `linear`."""
    size: str | None = None
    """A published size, which sets depth, width and heads: S, B, L or XL of dit; B, L or H of jit. null: set them."""
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
    max_group_size: int = Field(16, ge=1)
    """Largest group that the network can take: the rows of its sample embedding."""
    group_layers: tuple[int, ...] | None = Field(None, json_schema_extra={"sampling": "also"})
    """Blocks in which a group shares attention, counted from 0. null: all blocks."""
    time_scale: float = Field(1.0, gt=0)
    """Factor on times in [0, 1] before they are embedded; 1 in SiT and JiT. Must be 1 for path=ddpm."""
    bottleneck: int = Field(128, ge=1)
    """Of jit: width between the two layers that embed a patch."""
    context_tokens: int = Field(32, ge=0)
    """Of jit: number of tokens that carry the class."""
    context_start: int = Field(4, ge=0)
    """Of jit: the block before which the class tokens join, counted from 0."""

    @model_validator(mode="before")
    @classmethod
    def _fill_size(cls, values: dict) -> dict:
        size = values.get("size") if isinstance(values, dict) else None
        sizes = SIZES.get(str(values.get("backbone", "dit"))) if isinstance(size, str) else None
        if sizes is None:
            return values
        if size not in sizes:
            raise ValueError(f"size={size}: no such size; choose of {', '.join(sizes)}, or give depth, width, heads")
        for name, value in sizes[size].items():
            if values.get(name, value) != value:
                raise ValueError(f"{name}={values[name]}: contradicts size={size} ({name} {value}); set size=null")
        return {**values, **sizes[size]}

    @model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        if self.width % self.heads or self.width % 4:
            raise ValueError(f"width={self.width}: must be a multiple of heads={self.heads} and of 4")
        if self.backbone == "jit" and self.width // self.heads % 4:
            raise ValueError(f"heads={self.heads}: width / heads must be a multiple of 4 for backbone=jit")
        if self.backbone == "jit" and self.context_start >= self.depth:
            raise ValueError(f"context_start={self.context_start}: must be less than depth={self.depth}")
        for layer in self.group_layers or ():
            if not 0 <= layer < self.depth:
                raise ValueError(f"group_layers={list(self.group_layers)}: blocks are 0 to {self.depth - 1}")
        return self

    def shares(self, layer: int) -> bool:
        """Whether groups share the attention of a block."""
        return self.group_layers is None or layer in self.group_layers
