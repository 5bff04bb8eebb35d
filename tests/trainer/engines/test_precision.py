"""With precision=bf16, every engine computes what blocks add to tokens in bf16, and all else in fp32."""

import json

import pytest

from tests.trainer.engines.dtypes import observe
from tests.trainer.forked import train_tiny

FULL, HALF = ["float32"], ["bfloat16"]
ENGINES = {
    "single": (1, ["engine=single"]),
    "ddp": (2, ["engine=ddp"]),
    "fsdp": (2, ["engine=fsdp"]),
    "fsdp-recomputed": (2, ["engine=fsdp", "activation_checkpointing=1"]),
    "hsdp": (2, ["engine=hsdp", "shard_size=1"]),
    **{f"zero{stage}": (2, ["engine=deepspeed", f"zero={stage}"]) for stage in range(4)},
}
JIT = ["model.backbone=jit", "model.context_tokens=4", "model.context_start=1"]
BACKBONES = {"dit": [], "jit": JIT}
LAW = {  # in bf16
    "patches": HALF,
    "tokens": FULL,
    "time": FULL,
    "classes and slots": FULL,
    "conditioning": FULL,
    "norms": FULL,
    "branches": HALF,
    "queries and keys": HALF,
    "last layer": FULL,
    "prediction": FULL,
    "loss": FULL,
    "weights, averages and moments": FULL,
}


@pytest.fixture(scope="module")
def seen(module_ranks, tmp_path_factory):
    """Types by backbone, engine and precision."""
    folder = tmp_path_factory.mktemp("types")
    for world in (1, 2):
        module_ranks.run_many(
            world,
            observe,
            *(
                [*options, *model, f"precision={precision}", f"run={folder}/{backbone}-{name}-{precision}"]
                for name, (ranks, options) in ENGINES.items()
                for backbone, model in BACKBONES.items()
                for precision in ("bf16", "fp32")
                if ranks == world
            ),
        )
    return lambda *names: json.loads((folder / f"{'-'.join(names)}.json").read_text())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_branches_are_bf16_and_all_else_is_fp32(seen, backbone, engine):
    found = seen(backbone, engine, "bf16")
    assert {what: found[what] for what in LAW} == LAW


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_gradients_are_summed_in_fp32_over_micro_batches_and_ranks(seen, backbone, engine):
    found = seen(backbone, engine, "bf16")
    assert found["gradients"] in (FULL, [])  # DeepSpeed keeps them to itself
    assert found.get("reduced", []) == ([] if engine == "single" else FULL)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_fsdp_gathers_blocks_in_bf16_and_the_rest_in_fp32(seen, backbone):
    assert seen(backbone, "fsdp", "bf16")["gathered"] == HALF + FULL


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_in_fp32_there_is_nothing_else(seen, backbone, engine):
    assert all(types in (FULL, []) for types in seen(backbone, engine, "fp32").values())


def columns(rows):
    return [[row["loss"], row["grad_norm"]] for row in rows]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_bf16_is_the_same_in_all_engines_and_near_fp32(ranks, metrics, tmp_path, backbone):
    """Losses and norms of 20 steps. Stage 3 has layers of its own, which round before they add a bias."""
    names = [name for name, (world, _) in ENGINES.items() if world == 2]
    runs = [[*ENGINES[name][1], *BACKBONES[backbone], "precision=bf16", f"run={tmp_path}/{name}"] for name in names]
    ranks.run_many(2, train_tiny, ["engine=ddp", *BACKBONES[backbone], f"run={tmp_path}/fp32"], *runs)
    exact, expected = columns(metrics(tmp_path / "fp32")), columns(metrics(tmp_path / "ddp"))
    assert expected != exact
    assert [loss for loss, _ in expected] == pytest.approx([loss for loss, _ in exact], abs=2e-4)
    for name in names:
        for step, (a, b) in enumerate(zip(columns(metrics(tmp_path / name)), expected, strict=True)):
            for value, other, bound in zip(a, b, (1e-4, 1e-3) if name == "zero3" else (1e-5, 1e-4), strict=True):
                assert value == pytest.approx(other, abs=bound, rel=0), (name, step)
    assert metrics(tmp_path / "fsdp") == metrics(tmp_path / "fsdp-recomputed")


def test_fsdp_in_several_units_and_micro_batches_is_ddp(ranks, metrics, tmp_path):
    """Of JiT, whose norms have weights, which blocks of over a million others leave to the root."""
    wide = [*JIT, "model.width=256", "model.heads=4", "train.images=128", "train.micro_batch=8", "precision=bf16"]
    others = {"fsdp": ["engine=fsdp"], "recomputed": ["engine=fsdp", "activation_checkpointing=2"]}
    runs = [[*options, *wide, f"run={tmp_path}/{name}"] for name, options in {"ddp": ["engine=ddp"], **others}.items()]
    ranks.run_many(2, train_tiny, *runs)
    expected = columns(metrics(tmp_path / "ddp"))
    assert len(expected) == 4
    for name in others:
        for step, (a, b) in enumerate(zip(columns(metrics(tmp_path / name)), expected, strict=True)):
            assert a == pytest.approx(b, abs=1e-5, rel=0), (name, step)
