import random
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel

from models.choice import OneOf
from tests.stores import encoded, noise, pixels, write
from tests.trainer import detectors
from trainer.build import open_data
from trainer.checkpoints.weights import WeightSource, find_checkpoint
from trainer.config.fields import field_names
from trainer.config.parsing import dotted, to_yaml
from trainer.config.strict_yaml import parse
from trainer.config.tree import Config, check_world, load_config, parse_config
from trainer.errors import RunError
from trainer.loop import train
from trainer.sampling.samples import make_samples

CONFIGS = sorted([p for p in Path("configs").rglob("*.yaml") if p.parent.name != "cluster"])


def error_of(*overrides, config="configs/digits.yaml"):
    with pytest.raises(RunError) as caught:
        loaded = load_config(config, list(overrides))
        check_world(loaded, 2)
        open_data(loaded)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_every_config_is_valid_and_its_resolved_tree_reads_back_the_same(path):
    config = load_config(path)
    assert parse_config(parse(to_yaml(config))) == config


def test_overrides_win_over_the_file_and_the_file_over_its_base_and_that_over_defaults(tmp_path):
    (tmp_path / "base.yaml").write_text("optim: {lr: 1, warmup: 7}\nseed: 3\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/middle.yaml").write_text("base: ../base.yaml\noptim: {lr: 2}\n")
    (tmp_path / "top.yaml").write_text("base: sub/middle.yaml\ntrain: {global_batch: 64}\n")
    config = load_config(tmp_path / "top.yaml", ["train.global_batch=128", "optim.clip=null"])
    assert (config.optim.lr, config.optim.warmup, config.seed, config.train.global_batch) == (2, 7, 3, 128)
    assert config.optim.clip is None
    assert config.optim.weight_decay == Config.model_fields["optim"].default.weight_decay
    assert config.run == "runs/top"


def test_numbers_in_scientific_notation_are_numbers():
    assert load_config("configs/digits.yaml", ["optim.lr=2e-4"]).optim.lr == 2e-4


def test_a_size_can_be_named_and_group_sizes_of_sampling_follow_the_variant():
    config = load_config("configs/digits.yaml", ["model={size: S}", "groups.variant=full"])
    assert (config.model.depth, config.model.width, config.model.heads) == (12, 384, 6)
    assert (config.sample.cond_group_size, config.sample.uncond_group_size, config.groups.share) == (4, 4, 1)


def test_plain_networks_have_no_sample_embedding_unless_a_config_says_so():
    plain = ["groups.variant=none", "groups.size=1"]
    for overrides, slots in (
        (plain, 0),
        ([*plain, "model.max_group_size=null"], 0),
        ([*plain, "model.backbone=jit", "path=jit", "model.time_scale=1"], 0),
        ([*plain, "model.max_group_size=1"], 1),
        ([*plain, "model.max_group_size=7"], 7),
        ([], 16),
        (["model.max_group_size=null"], 16),
        (["groups.variant=full"], 16),
        (["model.max_group_size=4"], 4),
        (["groups.size=1", "model.max_group_size=0"], 0),
    ):
        config = load_config("configs/digits.yaml", overrides)
        assert config.model.max_group_size == config.model.slots == slots, overrides
        assert parse_config(config.model_dump()) == config


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("groups.sise=4", ["groups.sise=4", "did you mean groups.size?"]),
        ("group.size=4", ["group={'size': 4}", "did you mean groups.size?"]),
        ("lr=1e-3", ["lr=0.001", "did you mean optim.lr?"]),
        ("optim.lr=fast", ["optim.lr=fast", "number"]),
        ("optim.lr=-1", ["optim.lr=-1", "greater than 0"]),
        ("optim.lr.x=1", ["optim.lr.x=1", "single value"]),
        ("groups.variant=lite", ["groups.variant=lite", "'light'"]),
        ("groups.size=17", ["groups.size=17", "16"]),
        ("engine=zero", ["engine=zero", "'fsdp'"]),
        ("optim=3", ["optim=3", "section", "optim.lr"]),
        ("groups=null", ["groups=None", "section", "groups.variant"]),
        ("groups=3", ["groups=3", "section"]),
        ("model=null", ["model=None", "section"]),
        ("groups.variant=[1]", ["groups.variant=[1]", "'light'"]),
        ("model.size=[1]", ["model.size=[1]", "string"]),
        ("optim.betas=[2,0.9]", ["optim.betas.0=2", "less than 1"]),
        ("optim.lr=.inf", ["optim.lr=inf", "finite"]),
        ("sample.seed=99999999999", ["sample.seed=99999999999"]),
        ("train.global_batch=4096", ["train.global_batch=4096", "1198"]),
        ("groups.neighbors=2000", ["groups.neighbors=2000", "1197"]),
        ("model.patch=3", ["model.patch=3", "8"]),
        ("nonsense", ["nonsense", "field=value"]),
        ("groups.variant=none", ["groups.size=4", "size=1"]),
        ("groups.share=0", ["groups.share=0", "variant=light"]),
        ("groups.neighbors=2", ["groups.neighbors=2", "3"]),
        ("model.heads=5", ["model.width=96", "heads=5"]),
        ("model.size=S", ["model.depth=6", "size=S"]),
        ("model.size=Q", ["model.size=Q", "XL"]),
        ("model.max_group_size=2", ["groups.size=4", "model.max_group_size=2", "raise"]),
        ("model.max_group_size=0", ["groups.size=4", "model.max_group_size=0", "raise"]),
        ("model.max_group_size=-1", ["model.max_group_size=-1", "greater than or equal to 0"]),
        (
            "groups.variant=none groups.size=1 sample.uncond_group_size=2",
            ["sample.uncond_group_size=2", "size=0; lower"],
        ),
        ("groups.variant=none groups.size=1 sample.cond_group_size=4", ["sample.cond_group_size=4", "size=0; lower"]),
        ("sample.uncond_group_size=32", ["sample.uncond_group_size=32", "model.max_group_size=16"]),
        ("sample.cond_group_size=3", ["sample.uncond_group_size=4", "cond_group_size=3"]),
        ("sample.interval=[2, -2]", ["sample.interval=[2", "lowest"]),
        ("sample.group_window=[2, -2]", ["sample.group_window=[2", "lowest"]),
        ("groups.window=[2, -2]", ["groups.window=[2", "lowest"]),
        ("sample.guidance=-1", ["sample.guidance.0=-1"]),
        ("sample.sampler=ddpm", ["sample.sampler=ddpm", "path=linear", "heun"]),
        ("path=ddpm model.time_scale=1", ["sample.sampler=heun", "path=ddpm", "ddim or ddpm"]),
        ("path=ddpm sample.sampler=ddim", ["model.time_scale=1000", "0 to 999"]),
        ("path.name=ddpm path.timesteps=uniform", ["path.timesteps=uniform", "discrete"]),
        ("path.timesteps=discrete", ["path.timesteps=discrete", "uniform"]),
        ("path=lineal", ["path.name=lineal", "'linear'"]),
        ("path=ddpm model.time_scale=1 sample.sampler=ddpm sample.steps=1", ["sample.steps=1", "2 to 1000"]),
        ("sample.interval=[.nan, 2]", ["sample.interval.0"]),
        ("groups.window=[.nan, null]", ["groups.window.0"]),
        ("path.noise_scale=2", ["path.noise_scale=2", "jit"]),
        ("model.group_layers=[0,6]", ["model.group_layers=[0, 6]", "0 to 5"]),
        ("model.backbone=jit model.context_start=6", ["model.context_start=6", "depth=6"]),
        ("model.backbone=jit model.heads=16", ["model.heads=16", "multiple of 4"]),
        ("model.backbone=jit model.dropout=0.2 model.mlp=gelu", ["model.dropout=0.2", "set mlp=swiglu"]),
        ("model.backbone=jit model.dropout=1", ["model.dropout=1", "less than 1"]),
        ("model.dropout=0.2", ["model.dropout=0.2", "backbone=jit"]),
        ("sample.sampler=dopri5", ["train.sample_every=25600", "dopri5", "sample_every=0"]),
        ("sample.slots=redrawn sample.sampler=dopri5", ["sample.slots=redrawn", "sampler=dopri5", "set fixed"]),
        ("sample.slots=redrawn groups.variant=none groups.size=1", ["sample.slots=redrawn", "set fixed"]),
        ("sample.labels=equal", ["sample.labels", "'balanced'"]),
        ("sample.small=runs/x", ["sample.small=runs/x", "train.sample_every=0"]),
        ("train.global_batch=100", ["train.global_batch=100", "2 x 4 = 8", "96 or 104"]),
        ("train.micro_batch=6", ["train.micro_batch=6", "groups.size=4"]),
        ("train.images=100", ["train.images=100", "128"]),
        ("groups.mixing=within_step groups.splits=3", ["train.global_batch=128", "12", "120 or 132"]),
        ("groups.mixing=within_step groups.splits=1", ["groups.splits=1", "world size 2"]),
        ("engine=single", ["engine=single", "2 ranks", "engine=fsdp"]),
        ("engine=fdsp", ["engine=fdsp", "'fsdp'"]),
        ("engine=deepspeed zero=4", ["zero=4"]),
        ("engine=hsdp shard_size=3", ["shard_size=3", "world size 2"]),
        ("shard_size=2", ["shard_size=2", "engine=hsdp"]),
        ("engine=ddp offload=true", ["offload=True", "engine=fsdp"]),
        ("deepspeed.steps_per_print=5", ["steps_per_print", "engine=deepspeed"]),
        ("engine=deepspeed zero=3 compile=true", ["compile=True", "zero=2"]),
        ("engine=deepspeed deepspeed.zero_optimization.stage=1", ["deepspeed.zero_optimization.stage=1", "from zero"]),
        ("engine=deepspeed deepspeed.bf16.enabled=true", ["deepspeed.bf16", "precision"]),
        ("engine=deepspeed deepspeed.gradient_clipping=1", ["deepspeed.gradient_clipping=1", "optim.clip"]),
        ("engine=deepspeed deepspeed.train_batch_size=64", ["deepspeed.train_batch_size=64", "train.global_batch"]),
        ("checkpoint.snapshot_every=64", ["checkpoint.snapshot_every", "optim.power_ema"]),
        ("optim.power_ema=[0.3]", ["optim.power_ema", "0.28"]),
    ],
)
def test_a_bad_value_is_named_with_its_field_and_the_fix(override, named):
    message = error_of(*override.split(" ")) if "[" not in override else error_of(override)
    for part in named:
        assert part in message


def test_bad_files_are_named(tmp_path):
    assert "did you mean configs/digits.yaml?" in error_of(config="configs/digit.yaml")
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    assert "leads back to itself" in error_of(config=tmp_path / "a.yaml")
    (tmp_path / "c.yaml").write_text("a: [1\n")
    assert "c.yaml: not YAML" in error_of(config=tmp_path / "c.yaml")
    (tmp_path / "d.yaml").write_text("- 1\n")
    assert "d.yaml: holds a list" in error_of(config=tmp_path / "d.yaml")
    (tmp_path / "e.yaml").write_text("base: missing.yaml\n")
    assert "missing.yaml: no such config file" in error_of(config=tmp_path / "e.yaml")


def test_any_misspelt_field_is_answered_with_the_right_one():
    rng = random.Random(random.SystemRandom().random())
    known = field_names(Config)
    for name in known:
        head, _, leaf = name.rpartition(".")
        at = rng.randrange(len(leaf))
        wrong = f"{head}.{leaf[:at]}_x_{leaf[at:]}".removeprefix(".")
        assert f"did you mean {name}?" in error_of(f"{wrong}=1"), wrong


def test_dry_run_prints_the_resolved_tree_and_makes_nothing(tmp_path):
    command = [sys.executable, "tools/submit.py", "--cluster", "local", "--procs", "2", "--dry-run"]
    run = tmp_path / "run"
    shown = subprocess.run(
        [*command, "configs/digits.yaml", f"run={run}", "optim.lr=2e-4"], capture_output=True, text=True, check=True
    )
    expected = load_config("configs/digits.yaml", [f"run={run}", "optim.lr=2e-4"])
    assert parse_config(parse(shown.stdout)) == expected
    assert not run.exists()


TRAIN = {"images": 64, "global_batch": 32}
DEEPSPEED = {"groups": {"query": "random"}, "engine": "deepspeed"}


def test_every_field_is_read_by_something(tmp_path, tiny, monkeypatch, make_latents):
    """Train and sample with recording configs: a field that nothing reads is a field that does nothing."""
    read: set[tuple[str, str]] = set()
    config = load_config(
        tiny,
        [
            "engine=hsdp",
            "activation_checkpointing=2",
            f"run={tmp_path}/run",
            "train.sample_every=320",
            "train.images=320",
            "checkpoint.keep=1",
            "checkpoint.every=96",
        ],
    )
    within = parse_config({**config.model_dump(), "run": f"{tmp_path}/two", "groups": {"variant": "full", "size": 2}})
    make_latents(tmp_path)
    latents = {"name": "latents", "latents": f"{tmp_path}/latents", "neighbors": f"{tmp_path}/graph", "scaling": 0.5}
    by_number = parse_config(
        {**config.model_dump(), "run": f"{tmp_path}/three", "data": latents, "train": TRAIN, "groups": {"neighbors": 9}}
    )
    streamed = parse_config(
        {**by_number.model_dump(), "run": f"{tmp_path}/four", "data": {**latents, "streaming": True}, **DEEPSPEED}
    )
    for i in range(32):
        write(tmp_path / f"images/c/{i}.png", encoded(noise(i)))
    pixels(tmp_path / "images", tmp_path / "pixels")
    crops = {"name": "pixels", "pixels": f"{tmp_path}/pixels"}
    by_pixels = parse_config(
        {**by_number.model_dump(), "run": f"{tmp_path}/five", "data": crops, "groups": {"query": "random"}}
    )
    changes = ["engine=single", "train.sample_every=0", "train.images=64", "checkpoint.every=64", f"run={tmp_path}/six"]
    jit = load_config(
        tiny, [*changes, "path=jit", "model.backbone=jit", "model.context_start=1", "groups.window=[null,0]"]
    )
    detectors.save(detectors.Plain(6), tmp_path / "plain.pt")
    detectors.save_images(tmp_path / "real.npz", 20, seed=0)
    evaluation = {"every": 64, "detector": f"{tmp_path}/plain.pt", "reference": f"{tmp_path}/real.npz"}
    ddpm = load_config(tiny, [*changes, f"run={tmp_path}/seven", "path=ddpm", "sample.sampler=ddpm"])
    ddpm = parse_config({**ddpm.model_dump(), "evaluate": evaluation | {"per_class": 1, "metrics": ["fid"]}})
    adaptive, noisy = (
        jit.model_copy(update={"sample": jit.sample.model_copy(update={**changed, "steps": 3})})
        for changed in ({"sampler": "dopri5", "small": jit.run, "weaker": jit.run}, {"sampler": "sde"})
    )
    original = BaseModel.__getattribute__

    def owner(model, name):
        """The class that has the field first: a section of a choice shares most with the others."""
        return next(each for each in reversed(model.__mro__) if name in getattr(each, "model_fields", {})).__name__

    def recording(self, name):
        if name in type(self).model_fields:
            read.add((owner(type(self), name), name))
        return original(self, name)

    monkeypatch.setattr(BaseModel, "__getattribute__", recording)
    for each in (config, within):
        check_world(each, 1)
        train(each)
        make_samples(WeightSource(find_checkpoint(Path(each.run))), each)
    for each in (by_number, streamed, by_pixels, jit, ddpm):
        train(each)
    for each in (adaptive, noisy):
        make_samples(WeightSource(find_checkpoint(Path(each.run))), each)
    monkeypatch.undo()

    def fields(model):
        for name, field in model.model_fields.items():
            if choice := next((mark for mark in field.metadata if isinstance(mark, OneOf)), None):
                for section in choice.configs().values():
                    yield from fields(section)
            elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                yield from fields(field.annotation)
            else:
                yield owner(model, name), name

    # `size` is short for depth, width and heads, which are what is built; validation alone reads it
    assert set(fields(Config)) - read == {("BackboneConfig", "size")}


def test_dotted_names_are_those_of_the_resolved_tree():
    for choice, others in (("dit", ["bottleneck", "context_tokens", "context_start", "dropout"]), ("jit", [])):
        names = list(dotted(load_config("configs/digits.yaml", [f"model.backbone={choice}"]).model_dump()))
        not_there = {f"model.{name}" for name in others} | {"path.learns_variance", "path.noise_scale"}
        assert names == [name for name in field_names(Config) if name not in not_there]
        assert not_there <= {*field_names(Config)}
