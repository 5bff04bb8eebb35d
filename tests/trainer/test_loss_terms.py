"""Loss terms with heads on hidden states, with every engine."""

import pytest
import torch

from tests.trainer.forked import GROUPS, train_tiny
from tests.trainer.loss_terms import train_early

ENGINES = {  # name -> (ranks, overrides)
    "single": (1, ["engine=single"]),
    "accumulated": (1, ["engine=single", "train.micro_batch=4"]),
    "recomputed": (1, ["engine=single", "activation_checkpointing=1"]),
    "compiled": (1, ["engine=single", "compile=true"]),
    "ddp": (2, ["engine=ddp"]),
    "fsdp": (2, ["engine=fsdp"]),
    "fsdp-accumulated": (2, ["engine=fsdp", "train.micro_batch=4", "activation_checkpointing=1"]),
    "zero2": (2, ["engine=deepspeed", "zero=2", GROUPS]),
    "zero3": (2, ["engine=deepspeed", "zero=3"]),
}
WORLDS = {world: [name for name, (ranks, _) in ENGINES.items() if ranks == world] for world in (1, 2)}
EARLY = ["loss.early.weight=0.5", "checkpoint.every=320"]
LAST = "checkpoints/000000000320"


@pytest.fixture(scope="module")
def runs(module_ranks, tmp_path_factory):
    """Runs of ten steps, whole and in two halves."""
    folder = tmp_path_factory.mktemp("terms")
    for world, names in WORLDS.items():
        for images in (160, 320):
            halves = [[*ENGINES[n][1], *EARLY, f"run={folder}/{n}-halves", f"train.images={images}"] for n in names]
            whole = [[*run[:-2], f"run={folder}/{n}", run[-1]] for n, run in zip(names, halves, strict=True)]
            module_ranks.run_many(world, train_early, *halves, *(whole if images == 320 else []))
    return folder


def test_all_engines_train_the_same_terms_on_any_number_of_ranks(runs, metrics):
    names = ("loss", "loss/denoising", "loss/early", "grad_norm")
    expected = [[row[name] for name in names] for row in metrics(runs / "single")]
    assert len(expected) == 10 and expected[-1][2] < expected[0][2]
    for engine in ENGINES:
        for row, values in zip(metrics(runs / engine), expected, strict=True):
            assert [row[name] for name in names] == pytest.approx(values, abs=1e-5, rel=0), (engine, row["step"])
            assert row["loss"] == pytest.approx(row["loss/denoising"] + 0.5 * row["loss/early"], abs=1e-6), engine


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_with_a_head_resumes_bit_for_bit(engine, runs, same, tensors):
    same(runs / f"{engine}-halves", runs / engine, engine, LAST)
    found = tensors(runs / engine / LAST)
    assert {name.split(".")[0] for name in found} == {"model", "ema", "heads", "optimizer"}
    heads = {name: tensor for name, tensor in found.items() if name.startswith("heads.")}
    assert {tuple(tensor.shape) for tensor in heads.values()} == {(24, 32), (24,), (4, 24), (4,)}
    assert all(f"optimizer.state.{name}.exp_avg" in found for name in heads)


def test_weight_0_is_bit_for_bit_no_term(module_ranks, runs, metrics, same, tensors):
    for name, overrides in {"none": [], "zero": ["loss.early.weight=0"]}.items():
        length = ["engine=fsdp", "train.images=320", "checkpoint.every=320"]
        train = train_early if overrides else train_tiny
        module_ranks.run(2, train, f"run={runs / name}", *length, *overrides)
    same(runs / "zero", runs / "none", "weight 0", LAST)
    assert not any("/" in name for name in metrics(runs / "zero")[0])
    first, plain = metrics(runs / "fsdp")[0], metrics(runs / "none")[0]
    assert first["loss/denoising"] == plain["loss"], "a head changes no initial weight of the network"
    trained, without = tensors(runs / "fsdp" / LAST), tensors(runs / "none" / LAST)
    assert not torch.equal(trained["model.blocks.0.attn.qkv.weight"], without["model.blocks.0.attn.qkv.weight"])
