"""What a loss term is, and what it sees: one forward pass of the network over a batch.

To add a term, write a subclass of Term in a file of its own and add a line to TERMS (registry.py).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from pydantic import BaseModel, Field
from torch import Tensor, nn

from models.backbones.dropout import image_keys
from models.backbones.embeddings import NULL_LABEL
from models.backbones.precision import at_least_fp32
from models.paths.base import NoisePath


class NoisyImages(Protocol):
    """What a forward pass needs from a batch of B images in contiguous groups of `group_size`."""

    @property
    def x(self) -> Tensor:
        """Clean images (B, C, H, W)."""
        ...

    @property
    def noise(self) -> Tensor:
        """Their noise, (B, C, H, W)."""
        ...

    @property
    def u(self) -> Tensor:
        """Quantiles of the path's distribution of timesteps, (B,) in [0, 1]."""
        ...

    @property
    def label(self) -> Tensor:
        """Class numbers (B,)."""
        ...

    @property
    def slot(self) -> Tensor:
        """Rows of the sample embedding, (B,)."""
        ...

    @property
    def conditional(self) -> Tensor:
        """Which images keep their class, (B,) bool; the others get the null label."""
        ...

    @property
    def group_size(self) -> int:
        """Number of images in a group."""
        ...

    @property
    def grouped(self) -> int | None:
        """Number of images, from the first, that share attention in their groups. None: all."""
        ...

    @property
    def position(self) -> int:
        """Number of images seen before the step."""
        ...

    @property
    def extra(self) -> Mapping[str, Tensor]:
        """The tensors that loss terms ask for in `Term.extra`, (B, ...) each."""
        ...


@dataclass(frozen=True)
class Forward:
    """A forward pass over B images. `hidden` holds the outputs (B, L, width) of the blocks that terms asked for, by
    number, in fp32; tokens that are not patches, like JiT's class tokens, come first."""

    x_t: Tensor  # (B, C, H, W)
    t: Tensor  # (B,)
    prediction: Tensor  # (B, out channels, H, W), fp32 (fp64 from a network in fp64)
    hidden: Mapping[int, Tensor] = field(default_factory=dict)


class TermConfig(BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True):
    """The config section `loss.NAME` of a loss term. A term with fields of its own has a subclass."""

    weight: float = Field(1.0, ge=0, allow_inf_nan=False)
    """Factor of the term in the loss. 0: leave the term out."""


class Term(ABC):
    """A loss per image that is added to the other terms.

    It is constructed once per run; the random initial weights of `modules` depend on the run's seed and the term's
    name. The modules are trained like the network and saved in checkpoints, but neither averaged nor exported.
    """

    Config: ClassVar[type[TermConfig]] = TermConfig
    hidden: tuple[int, ...] = ()  # numbers of the blocks, from 0, whose outputs it needs
    extra: tuple[str, ...] = ()  # names of the extra tensors that it needs, which the images must declare
    modules: nn.Module | None = None  # what it trains, called as one: `self.modules(...)`

    def __init__(self, config: TermConfig, network: nn.Module, extra: Mapping[str, tuple[int, ...]]) -> None:
        """Take the fields of `loss.NAME`, the network before it is distributed over the ranks (for its sizes), and the
        shapes of the extra tensors that the images declare. Raise ValueError (`field=value: ...`) if a field does not
        fit these."""
        self.config = config

    @abstractmethod
    def __call__(self, forward: Forward, batch: NoisyImages, path: NoisePath) -> Tensor:
        """Return the loss of each image, (B,), fp32. It may depend on the other images of the group, but not on the
        rest of the batch, which differs with the number of ranks. All ranks call this in each micro-batch; it must draw
        no random numbers, and must call its modules."""


def forward_pass(network: Callable[..., Tensor], path: NoisePath, batch: NoisyImages, drop: bool = False) -> Forward:
    """Add the batch's noise, call the network and return the result, without hidden states. With `drop`, give the
    network the keys of the images' dropout."""
    t = path.timestep(batch.u, batch.position)
    x_t = path.noisy(batch.x, batch.noise, t)
    label = batch.label.masked_fill(~batch.conditional, NULL_LABEL)
    keys = (image_keys(batch.noise),) if drop else ()
    prediction = network(x_t, t, label, batch.slot, batch.group_size, batch.grouped, *keys)
    return Forward(x_t, t, at_least_fp32(prediction))
