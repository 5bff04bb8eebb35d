"""All engines compute the same thing."""

import shutil
import subprocess
import sys

import pytest
import torch

from data.sets.registry import DataConfig, open_images
from tests.trainer.forked import GROUPS, train_tiny
from trainer.build import build_network, open_data
from trainer.config.tree import load_config
from trainer.engines.build import build_engine
from trainer.ranks import process_group

WIDE = ["model.width=256", "model.heads=4", "train.images=160"]  # blocks of over a million weights: several FSDP units


def test_deepspeed_is_imported_only_when_it_is_used():
    code = "import sys, trainer.loop; sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def columns(rows):
    return [[row["loss"], row["grad_norm"]] for row in rows]


def test_engines_world_sizes_and_accumulation_give_the_same_losses_and_norms(ranks, metrics, tmp_path):
    def runs(*engines):
        for engine in engines:
            yield [f"engine={engine}", f"run={tmp_path}/{engine}", "checkpoint.every=640"]
            yield [f"engine={engine}", f"run={tmp_path}/{engine}-acc", "checkpoint.every=640", "train.micro_batch=2"]
            yield [f"engine={engine}", f"run={tmp_path}/{engine}-wide", "checkpoint.every=640", *WIDE]

    def names(world, *overrides):
        return [[*run[:1], run[1] + f"-{world}", *run[2:], *overrides] for run in runs("fsdp", "ddp")]

    ranks.run_many(1, train_tiny, *runs("single"))
    ranks.run_many(2, train_tiny, *names(2))
    ranks.run_many(4, train_tiny, *names(4)[:3])
    for kind in ("", "-acc", "-wide"):
        expected = columns(metrics(tmp_path / f"single{'' if kind == '-acc' else kind}"))
        assert len(expected) == (5 if kind == "-wide" else 20)
        for other in (f"single{kind}", f"ddp{kind}-2", f"fsdp{kind}-2", f"fsdp{kind}-4"):
            found = columns(metrics(tmp_path / other))
            for step, (a, b) in enumerate(zip(found, expected, strict=True)):
                assert a == pytest.approx(b, abs=1e-5, rel=0), (other, step)


HOST = "deepspeed={zero_force_ds_cpu_optimizer: false, zero_optimization: {offload_optimizer: {device: cpu}}}"
OTHERS = {  # name -> (ranks, overrides)
    "hsdp": (4, ["engine=hsdp", "shard_size=2"]),
    "offload": (2, ["engine=fsdp", "offload=true"]),
    **{f"zero{stage}": (2, ["engine=deepspeed", f"zero={stage}"]) for stage in range(4)},
    **{f"zero{stage}-groups": (2, ["engine=deepspeed", f"zero={stage}", GROUPS]) for stage in (2, 3)},
    "zero2-host": (2, ["engine=deepspeed", "zero=2", HOST]),
}


def test_hsdp_deepspeed_and_offload_give_the_losses_norms_and_averages_of_one_process(
    ranks, metrics, tensors, tmp_path
):
    """Ten steps; with gradients accumulated over micro-batches too."""
    length = ["train.images=320", "checkpoint.every=320"]
    ranks.run(1, train_tiny, *length, "engine=single", f"run={tmp_path}/single")
    for world in (2, 4):
        runs = {name: overrides for name, (size, overrides) in OTHERS.items() if size == world}
        plain = [[*length, *overrides, f"run={tmp_path}/{name}"] for name, overrides in runs.items()]
        accumulated = [[*run[:-1], f"{run[-1]}-acc", "train.micro_batch=2"] for run in plain]
        ranks.run_many(world, train_tiny, *plain, *accumulated)
    expected, last = columns(metrics(tmp_path / "single")), "checkpoints/000000000320"
    weights = tensors(tmp_path / "single" / last)
    for name in [*OTHERS, *(f"{name}-acc" for name in OTHERS)]:
        found = columns(metrics(tmp_path / name))
        for step, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert a == pytest.approx(b, abs=1e-5, rel=0), (name, step)
        other = tensors(tmp_path / name / last)
        assert other.keys() == weights.keys()
        for key in weights:
            if key.startswith("ema."):
                assert torch.allclose(other[key], weights[key], rtol=0, atol=1e-5), (name, key)


def test_recomputed_activations_and_host_memory_change_no_bit(ranks, metrics, tmp_path):
    runs = [["engine=single", f"activation_checkpointing={k}", f"run={tmp_path}/s{k}"] for k in (0, 1, 2)]
    ranks.run_many(1, train_tiny, *runs)
    runs = [["engine=fsdp", f"activation_checkpointing={k}", f"run={tmp_path}/f{k}"] for k in (0, 1)]
    ranks.run_many(2, train_tiny, *runs, ["engine=fsdp", "offload=true", f"run={tmp_path}/offload"])
    assert metrics(tmp_path / "s0") == metrics(tmp_path / "s1") == metrics(tmp_path / "s2")
    assert metrics(tmp_path / "f0") == metrics(tmp_path / "f1") == metrics(tmp_path / "offload")


def test_recomputing_keeps_only_the_inputs_of_blocks(tiny, tmp_path):
    """The memory that autograd keeps, counted by the tensors that it saves."""
    images, kept = open_data(load_config(tiny)), {}
    for every in (0, 1, 2):
        config = load_config(tiny, ["engine=single", f"activation_checkpointing={every}", "model.depth=4"])
        with process_group() as ranks:
            engine = build_engine(config, config.optim, build_network(config, images), ranks)
            saved: dict[int, int] = {}
            number = torch.arange(8)
            weights = {weight.data_ptr() for weight in engine.weights.values()}
            with torch.autograd.graph.saved_tensors_hooks(
                lambda t, saved=saved: saved.setdefault(t.data_ptr(), t.nbytes) and t, lambda t: t
            ):
                loss = engine(torch.randn(8, 1, 8, 8), number / 8, number, number, 1).square().mean()
            kept[every] = sum(size for pointer, size in saved.items() if pointer not in weights)
            engine.backward(loss)
    assert kept[1] < 0.3 * kept[0]
    assert kept[1] < kept[2] < 0.7 * kept[0]


@pytest.mark.parametrize("name", ["fsdp", "hsdp"])
def test_gradients_are_exchanged_in_the_last_micro_batch_only(name, tiny):
    """Until then no rank has shards of them."""
    config = load_config(tiny, [f"engine={name}"])
    images, number = open_data(config), torch.arange(8)
    with process_group() as ranks:
        engine = build_engine(config, config.optim, build_network(config, images), ranks)
        for last in (False, False, True):
            with engine.accumulating(last):
                engine.backward(engine(torch.randn(8, 1, 8, 8), number / 8, number, number, 1).square().mean())
            assert all((weight.grad is not None) == last for weight in engine.weights.values())


def test_sampling_during_training_does_not_disturb_it(ranks, metrics, tensors, tmp_path):
    for world, engines in ((1, ["single"]), (2, ["ddp", "fsdp"])):
        plain = [[f"engine={engine}", f"run={tmp_path}/{engine}"] for engine in engines]
        shown = [[*run[:1], f"{run[1]}-shown", "train.sample_every=64"] for run in plain]
        ranks.run_many(world, train_tiny, *plain, *shown)
        for engine in engines:
            assert metrics(tmp_path / engine) == metrics(tmp_path / f"{engine}-shown")
            plain_weights, shown_weights = (
                tensors(tmp_path / name / "checkpoints/000000000640") for name in (engine, f"{engine}-shown")
            )
            assert all((plain_weights[name] == shown_weights[name]).all() for name in plain_weights)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler: apt-get install g++")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_blocks_have_the_gradients_of_eager_ones(tiny, tmp_path, precision):
    """For single images and groups, and with the strides that the patch embedding really gives."""
    images = open_images(DataConfig())
    gradients = []
    for options in ([], ["compile=true"], ["compile=true", "activation_checkpointing=1"]):
        config = load_config(tiny, ["engine=single", f"precision={precision}", *options, f"run={tmp_path}"])
        torch._dynamo.utils.counters.clear()
        with process_group() as ranks:
            network = build_network(config, images)
            torch.manual_seed(0)
            for parameter in network.parameters():
                torch.nn.init.normal_(parameter, std=0.1)
            engine = build_engine(config, config.optim, network, ranks)
            number = torch.arange(8)
            for group_size in (1, 4):
                x = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(group_size))
                engine(x, number / 8, number, number, group_size).square().mean().backward()
            gradients.append([parameter.grad for parameter in network.parameters()])
        graphs, breaks = (torch._dynamo.utils.counters[kind] for kind in ("stats", "graph_break"))
        assert (graphs["unique_graphs"] > 0) == bool(options) and not breaks, "whole blocks are compiled"
    for eager, *compiled in zip(*gradients, strict=True):
        for other in compiled:
            if precision == "fp32":
                assert torch.allclose(eager, other, atol=1e-5, rtol=1e-4)
            else:  # compiled blocks round less often
                assert (other - eager).norm() <= 0.01 * eager.norm()
