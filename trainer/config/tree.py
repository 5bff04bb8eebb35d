"""The config tree: defaults <- YAML (with `base:`) <- dotted overrides. Each part is defined beside what it
configures."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import pydantic
from pydantic import BaseModel, Field, model_validator

from data.batches.plan import GroupsConfig, group_quantum
from data.sets.registry import SETS, DataConfig
from models.backbones.registry import ModelConfig, model_config
from models.objectives.registry import Losses
from models.paths.registry import ChosenPath, make_path, path_config
from models.sampling.generation import SampleConfig
from models.sampling.registry import SAMPLERS, fitting_samplers
from trainer.checkpoints.config import CheckpointConfig, ResumeConfig
from trainer.config.fields import text_fields, walk
from trainer.config.legacy import rename, upgrade
from trainer.config.parsing import explain, read_yaml, set_dotted
from trainer.config.paths import expand_paths
from trainer.config.strict_yaml import YamlError, parse
from trainer.config.sweeps import parse_sweep
from trainer.engines.build import check_engine, check_ranks
from trainer.engines.config import EngineConfig, OptimConfig
from trainer.engines.schedules import check_schedule
from trainer.errors import RunError
from trainer.sinks import SINKS

STORED = "config.yaml"  # what the resolved config is called in run folders and checkpoints


class TrainConfig(BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True):
    """How long to train, and in what batches. All counts are in images, so that they survive a change of batch size."""

    images: int = Field(102_400_000, ge=1, json_schema_extra={"may_change": True})
    """Length of the run in images, rounded to whole global batches."""
    global_batch: int = Field(256, ge=1)
    """Images per step, over all ranks."""
    micro_batch: int | None = Field(None, ge=1, json_schema_extra={"may_change": True})
    """Largest number of images that a rank passes through the network at once; a multiple of groups.size. null: its
    whole share."""
    log_every: int = Field(12_800, ge=1, json_schema_extra={"may_change": True, "affects_results": False})
    """Images between two log entries; metrics.jsonl has every step."""
    sample_every: int = Field(0, ge=0, json_schema_extra={"may_change": True})
    """Images between two sample grids in TensorBoard. 0: none."""
    attention_every: int = Field(1_280_000, ge=0, json_schema_extra={"may_change": True})
    """Images between two measurements of how much attention crosses between the images of a group. 0: none."""
    sinks: tuple[str, ...] = Field(
        ("metrics", "tensorboard", "progress"),
        json_schema_extra={"may_change": True, "affects_results": False, "keys_of": "trainer.sinks:SINKS"},
    )
    """What the run reports to: metrics (metrics.jsonl and measures.jsonl), tensorboard, progress (a bar)."""
    timeout: float = Field(1800, gt=0, json_schema_extra={"may_change": True, "affects_results": False})
    """Seconds after which a rank stops waiting for the others, and the run fails."""

    @model_validator(mode="after")
    def _check(self) -> "TrainConfig":
        for name in self.sinks:
            if name not in SINKS:
                raise ValueError(f"sinks={list(self.sinks)}: {name} is none of {', '.join(SINKS)}; set some of these")
        return self


class EvaluateConfig(
    BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True, json_schema_extra={"may_change": True}
):
    """How samples are measured while training. They are made with the averaged weights and the settings of `sample`."""

    every: int = Field(0, ge=0)
    """Images between two evaluations. 0: none."""
    per_class: int = Field(10, ge=1)
    """Samples of each class to measure."""
    detector: str | None = Field(None, json_schema_extra={"path": True})
    """File or name of the network whose features are compared, as for tools/evaluate.py. null: a small classifier of
    the run's own images (digits, glyphs, pixels)."""
    reference: str | None = Field(None, json_schema_extra={"path": True})
    """Real images, or their statistics, to compare with; goes with `detector`."""
    metrics: tuple[str, ...] | None = None
    """Metrics to compute, for example [fid, is]. null: all that the detector offers and the reference allows."""

    @model_validator(mode="after")
    def _check(self) -> "EvaluateConfig":
        if bool(self.detector) != bool(self.reference):
            raise ValueError(f"reference={self.reference}: a detector and its reference go together; set both or none")
        return self


class Config(EngineConfig, extra="forbid", frozen=True, use_attribute_docstrings=True):
    """A run. `load_config` reads it; `check_world` checks that a world size fits it."""

    run: str = Field(json_schema_extra={"may_change": True, "affects_results": False, "path": True})
    """The run folder; the same command on the same folder continues the run. Default: runs/ and the config's name."""
    init_from: str | None = Field(None, json_schema_extra={"path": True})
    """Weights to start from: a run, a checkpoint, a .safetensors or a .pt file. null: random weights."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of everything random in training: weights, order of images, noise, timesteps."""
    path: ChosenPath = path_config({})
    loss: Losses = {}
    """Terms of the loss by name, each with its weight. `denoising` is always included."""
    data: DataConfig = DataConfig.model_validate({})
    model: ModelConfig = model_config({})
    groups: GroupsConfig = GroupsConfig.model_validate({})
    optim: OptimConfig = OptimConfig.model_validate({})
    train: TrainConfig = TrainConfig.model_validate({})
    checkpoint: CheckpointConfig = CheckpointConfig.model_validate({})
    resume: ResumeConfig = ResumeConfig.model_validate({})
    sample: SampleConfig = SampleConfig.model_validate({})
    evaluate: EvaluateConfig = EvaluateConfig.model_validate({})

    @model_validator(mode="after")
    def _check(self) -> "Config":
        check_engine(self, self.optim)
        check_schedule(self.optim, self.train.images)
        if self.model.max_group_size is None:
            slots = 0 if self.groups.variant == "none" else self.model.slots
            self._resolve("model", self.model.model_copy(update={"max_group_size": slots}))
        size, slots = self.groups.size, self.model.slots
        if size > max(slots, 1):
            raise ValueError(f"groups.size={size}: above model.max_group_size={slots}; lower one or raise the other")
        if self.train.images < self.train.global_batch:
            raise ValueError(f"train.images={self.train.images}: less than one batch of {self.train.global_batch}")
        if self.checkpoint.snapshot_every and not self.optim.power_ema:
            raise ValueError("checkpoint.snapshot_every: there is nothing to snapshot; set optim.power_ema=[0.05,0.1]")
        if self.evaluate.every and not self.evaluate.detector and not SETS[self.data.name].halves:
            raise ValueError(f"evaluate.detector=null: data.name={self.data.name} needs one, and evaluate.reference")
        if self.train.micro_batch and self.train.micro_batch % size:
            raise ValueError(f"train.micro_batch={self.train.micro_batch}: must be a multiple of groups.size={size}")
        quantum = group_quantum(self.groups, self.train.global_batch)
        if self.train.global_batch % quantum:
            raise ValueError(
                f"train.global_batch={self.train.global_batch}: groups.mixing=within_step needs a multiple of"
                f" groups.size x groups.splits = {quantum}; set {_nearest(self.train.global_batch, quantum)}"
            )
        if (steps := self.path.steps) and self.model.time_scale != 1:
            times = f"the times of path={self.path.name} are 0 to {steps - 1}"
            raise ValueError(f"model.time_scale={self.model.time_scale}: {times}; set 1")
        path = make_path(self.path)
        path.even_times(self.sample.steps)  # raises if it does not have that many
        if self.sample.sampler not in (fitting := fitting_samplers(path)):
            fix = f"not for path={self.path.name}; set {' or '.join(fitting)}"
            raise ValueError(f"sample.sampler={self.sample.sampler}: {fix}")
        if self.sample.slots == "redrawn" and not slots:
            raise ValueError("sample.slots=redrawn: model.max_group_size=0 has no sample embedding to draw; set fixed")
        sample = self.sample.for_variant(self.groups.variant, size, self.groups.window)
        for name in ("cond_group_size", "uncond_group_size"):
            value = getattr(sample, name)
            if value > max(slots, 1):
                raise ValueError(f"sample.{name}={value}: above model.max_group_size={slots}; lower it")
        self._resolve("sample", sample)
        return self

    def _resolve(self, name: str, section: BaseModel) -> None:
        """Replace a section by one that shows what its nulls mean; `frozen` is for users."""
        object.__setattr__(self, name, section)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Return the config of a file with overrides like `optim.lr=2e-4`. Raise RunError (one line) if anything is
    wrong."""
    texts = text_fields(Config)
    tree = read_yaml(Path(path), texts)
    tree = upgrade(tree) if Path(path).name == STORED else rename(tree)
    for override in overrides:
        set_dotted(tree, override, texts)
    tree.setdefault("run", f"runs/{Path(path).stem}")
    return parse_config(tree)


def load_sweep(path: str | Path, overrides: list[str], sweeps: list[str]) -> list[Config]:
    """Return a config for each combination of the values of `sweeps`, like `seed=0,1,2`: runs in folders below the
    config's, with absolute paths. Without sweeps, the config itself."""
    axes = [parse_sweep("--sweep", sweep) for sweep in sweeps]
    configs = []
    for values in itertools.product(*(values for _, values in axes)):
        chosen = [f"{name}={value}" for (name, _), value in zip(axes, values, strict=True)]
        config = load_config(path, [*overrides, *chosen])
        run = Path(config.run).absolute() / ",".join(chosen).replace("/", "_")  # the folder itself if none is chosen
        configs.append(config.model_copy(update={"run": str(run)}))
    return configs


def change_config(config: Config, overrides: Sequence[str]) -> Config:
    """Return the config with overrides like `sample.steps=20`. Raise RunError if one is wrong."""
    tree, texts = config.model_dump(), text_fields(Config)
    for override in overrides:
        set_dotted(tree, override, texts)
    return parse_config(tree)


def stored_config(text: str) -> Config:
    """Return the config that a run folder, a checkpoint or a file of weights holds, of this version or an older one."""
    try:
        tree = parse(text, text_fields(Config))
    except YamlError as error:
        raise RunError(str(error)) from None
    return parse_config(upgrade(tree) if isinstance(tree, dict) else tree)


def parse_config(tree: dict) -> Config:
    """Return the config of a tree of plain values. Raise RunError, which names the first invalid field, if any."""
    paths = [field.name for field in walk(Config) if field.marks.get("path")]
    try:
        return Config.model_validate(expand_paths(tree, paths))
    except pydantic.ValidationError as error:
        raise RunError(explain(error, {field.name: field.text for field in walk(Config)})) from None


def check_world(config: Config, world_size: int) -> None:
    """Raise RunError if the batches cannot be dealt to `world_size` ranks in whole groups."""
    check_ranks(config, world_size)
    for every in ("train.sample_every", "evaluate.every"):
        part, name = every.split(".")
        if not (value := getattr(getattr(config, part), name)):
            continue
        if world_size > 1 and SAMPLERS[config.sample.sampler].adaptive:
            raise RunError(
                f"{every}={value}: with sample.sampler={config.sample.sampler} ranks would take different numbers of"
                f" steps and wait forever; set another sampler, or {every}=0"
            )
        for other in ("weaker", "small"):
            if file := getattr(config.sample, other):
                raise RunError(f"sample.{other}={file}: not while training; set {every}=0")
    batch, unit = config.train.global_batch, world_size * config.groups.size
    if batch % unit:
        raise RunError(
            f"train.global_batch={batch}: must be a multiple of world size x groups.size = {world_size} x"
            f" {config.groups.size} = {unit}; set {_nearest(batch, unit)}, or as many ranks as divide"
            f" {batch // config.groups.size}"
        )
    if config.groups.mixing == "within_step" and config.groups.splits % world_size:
        raise RunError(
            f"groups.splits={config.groups.splits}: the world size {world_size} must divide it;"
            f" set {_nearest(config.groups.splits, world_size)}"
        )


def _nearest(value: int, unit: int) -> str:
    below = value // unit * unit
    return f"{below} or {below + unit}" if below else str(unit)
