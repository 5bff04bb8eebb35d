"""Turn noise into images: sampler, guidance and group sizes combined."""

from collections.abc import Callable
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from models.choice import NameOf
from models.paths.base import NoisePath
from models.sampling.guidance import Guidance, Interval, Networks, guided, log_snr_at, stitched
from models.sampling.registry import SAMPLERS
from models.sampling.samplers import Draw, NotFinite, Problem, SamplerConfig, State, all_finite

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class SampleConfig(
    SamplerConfig,
    extra="forbid",
    frozen=True,
    use_attribute_docstrings=True,
    json_schema_extra={"sampling": "only", "may_change": True},
):
    """How images are generated: `per_class` images of every class, in groups of the larger of C and UC."""

    sampler: Annotated[str, NameOf(SAMPLERS)] = "heun"
    """The method that follows the path from noise to images; which ones fit depends on the path."""
    steps: int = Field(50, ge=1)
    """Number of steps from noise to image. dopri5 chooses its own."""
    guidance: tuple[Weight, ...] = Field((1.5,), min_length=1)
    """Guidance weight w of u + w (c - u), where 1 means none. If there are several, groups use them in turn."""
    interval: Interval | None = None
    """Lowest and highest log-SNR at which guidance acts. null: everywhere."""
    guided_channels: int | None = Field(None, ge=1)
    """Number of channels, from the first, that guidance acts on. null: all."""
    cond_group_size: int | None = Field(None, ge=1)
    """C: images that share attention in the conditional prediction. null: as the variant trains (1, 1, groups.size)."""
    uncond_group_size: int | None = Field(None, ge=1)
    """UC: images that share attention in the unconditional prediction. null: as the variant trains (1, groups.size,
    groups.size)."""
    group_window: Interval | None = None
    """Lowest and highest log-SNR at which groups share attention. null: as groups.window."""
    weaker: str | None = Field(None, json_schema_extra={"path": True})
    """Weights of a network whose prediction replaces the unconditional one in guidance. null: none."""
    small: str | None = Field(None, json_schema_extra={"path": True})
    """Weights of a smaller network that takes the noisiest steps. null: none."""
    small_share: float = Field(0.4, ge=0, le=1)
    """Share of the steps that `small` takes."""
    slots: Literal["fixed", "redrawn"] = "fixed"
    """Rows of the sample embedding: each image keeps one (fixed), or each network call draws them anew (redrawn, as
    GroupDiff's public code does)."""
    per_class: int = Field(16, ge=1)
    """Images to generate of each class."""
    labels: Literal["balanced", "random"] = "balanced"
    """Classes of a number of images (--num): as many of each, whatever the group size (balanced), or one drawn for each
    group (random)."""
    batch: int = Field(256, ge=1)
    """Most images that a process generates at once; at least one group."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of the noise."""

    @field_validator("guidance", mode="before", json_schema_input_type=Weight | tuple[Weight, ...])
    @classmethod
    def _one_or_more(cls, value: object) -> object:
        return value if isinstance(value, list | tuple) else (value,)

    @model_validator(mode="after")
    def _check(self) -> "SampleConfig":
        if self.slots == "redrawn" and SAMPLERS[self.sampler].adaptive:
            raise ValueError(
                f"slots=redrawn: not for sampler={self.sampler}, whose calls are as many as a whole batch needs; set"
                " fixed, or another sampler"
            )
        return self

    @property
    def group_size(self) -> int:
        """Number of images that are generated together."""
        return max(self.cond_group_size or 1, self.uncond_group_size or 1)

    def guidance_of(self, weight: float | Tensor) -> Guidance:
        """Return the guidance for a weight, one number or (B,). Raise ValueError unless C and UC are filled in."""
        if self.cond_group_size is None or self.uncond_group_size is None:
            raise ValueError("sample.cond_group_size=null: the group sizes are not filled in; call for_variant")
        sizes = self.cond_group_size, self.uncond_group_size
        return Guidance(weight, *sizes, self.interval, self.group_window, self.guided_channels)

    def for_variant(self, variant: str, size: int, window: Interval | None) -> "SampleConfig":
        """Return the config with C, UC and window filled in as the variant was trained (arXiv 2512.10954)."""
        c, uc = {"none": (1, 1), "light": (1, size), "full": (size, size)}[variant]
        c, uc = self.cond_group_size or c, self.uncond_group_size or uc
        if max(c, uc) % min(c, uc):
            raise ValueError(f"sample.uncond_group_size={uc}: it and cond_group_size={c} must divide one another")
        for name in ("interval", "group_window"):
            value = getattr(self, name)
            if value and None not in value and value[0] > value[1]:
                raise ValueError(f"sample.{name}={list(value)}: lowest log-SNR first")
        changes = {"cond_group_size": c, "uncond_group_size": uc, "group_window": self.group_window or window}
        return self.model_copy(update=changes)


class Sampled(NamedTuple):
    """Images (B, C, H, W), the number of evaluations that they took, and after how many steps each was still finite,
    (B,) int64: none of them is good if one is not finite in the end."""

    images: Tensor
    evaluations: int
    finite: Tensor


@torch.no_grad()
def sample_images(
    networks: Networks,
    path: NoisePath,
    config: SampleConfig,
    noise: Tensor,
    label: Tensor,
    slot: Tensor | Callable[[int, int], Tensor],
    weight: float | Tensor,
    draw: Draw,
) -> Sampled:
    """Return images (B, C, H, W), given noise of that shape, label (B,) and slot (B,), or a function that returns slot
    given the number of the evaluation, from 0, and of its prediction (0: conditional, 1: the other); B is whole groups,
    each contiguous. `weight`: of guidance, one number or (B,). `draw(i)`: noise of the i-th step, for samplers that
    need it. One evaluation is a prediction with its guidance, so one or two network calls."""
    sampler = SAMPLERS[config.sampler]
    times = sampler.times(path, config.steps, config)
    guidance = config.guidance_of(weight)
    evaluations = 0

    def slots(prediction: int) -> Tensor:
        return slot if isinstance(slot, Tensor) else slot(evaluations, prediction)

    denoise = guided(networks, path, guidance, label, slots)
    if networks.small:
        noisiest = int(config.small_share * config.steps + 1e-9)  # 0.29 * 100 is 28.999...
        first = guided(networks._replace(network=networks.small), path, guidance, label, slots)
        whole = noisiest == config.steps  # also at the data, whose log-SNR is not below any switch
        denoise = first if whole else stitched(first, denoise, path, log_snr_at(path, times[noisiest]))

    def counted(x: Tensor, t: float) -> Tensor:
        nonlocal evaluations
        prediction = denoise(x, t)
        evaluations += 1
        return prediction

    problem, state, last = Problem(counted, path, times, draw, config), State(path.start(noise)), len(times) - 1
    finite = torch.zeros_like(label)
    while state.step < last:
        try:
            state = sampler.step(problem, state)
            steps_on = all_finite(state.x)
        except NotFinite as stopped:
            state, steps_on = State(torch.full_like(noise, torch.nan), last), stopped.finite
        finite = torch.where(steps_on, state.step, finite)
    return Sampled(state.x, evaluations, finite)
