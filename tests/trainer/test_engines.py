"""All engines compute the same thing."""

import shutil

import pytest
import torch

from data.images import DataConfig, open_images
from trainer.build import build_network
from trainer.config import load_config
from trainer.engines import build_engine
from trainer.ranks import process_group

WIDE = ["model.width=256", "model.heads=4", "train.images=160"]  # blocks of over a million weights: several FSDP units


def columns(rows):
    return [[row["loss"], row["grad_norm"]] for row in rows]


def test_engines_world_sizes_and_accumulation_give_the_same_losses_and_norms(launcher, metrics, tmp_path):
    def runs(*engines):
        for engine in engines:
            yield [f"engine={engine}", f"run={tmp_path}/{engine}", "checkpoint.every=640"]
            yield [f"engine={engine}", f"run={tmp_path}/{engine}-acc", "checkpoint.every=640", "train.micro_batch=2"]
            yield [f"engine={engine}", f"run={tmp_path}/{engine}-wide", "checkpoint.every=640", *WIDE]

    def names(world, *overrides):
        return [[*run[:1], run[1] + f"-{world}", *run[2:], *overrides] for run in runs("fsdp", "ddp")]

    launcher.run(1, *runs("single"))
    launcher.run(2, *names(2))
    launcher.run(4, *names(4)[:3])
    for kind in ("", "-acc", "-wide"):
        expected = columns(metrics(tmp_path / f"single{'' if kind == '-acc' else kind}"))
        assert len(expected) == (5 if kind == "-wide" else 20)
        for other in (f"single{kind}", f"ddp{kind}-2", f"fsdp{kind}-2", f"fsdp{kind}-4"):
            found = columns(metrics(tmp_path / other))
            for step, (a, b) in enumerate(zip(found, expected, strict=True)):
                assert a == pytest.approx(b, abs=1e-5, rel=0), (other, step)


def test_bf16_stays_near_fp32_and_differs_from_it(launcher, metrics, tmp_path):
    """Measured on 20 steps: losses within 0.0003. The weights stay fp32, so the error does not grow."""
    runs = {
        name: [f"engine={name.split('-')[0]}", f"precision={name.split('-')[1]}", f"run={tmp_path}/{name}"]
        for name in ("ddp-fp32", "ddp-bf16", "fsdp-bf16")
    }
    launcher.run(2, *runs.values())
    expected = columns(metrics(tmp_path / "ddp-fp32"))
    for name in ("ddp-bf16", "fsdp-bf16"):
        found = columns(metrics(tmp_path / name))
        assert found != expected
        assert [row[0] for row in found] == pytest.approx([row[0] for row in expected], abs=0.002)


def test_sampling_during_training_does_not_disturb_it(launcher, metrics, tensors, tmp_path):
    for world, engines in ((1, ["single"]), (2, ["ddp", "fsdp"])):
        plain = [[f"engine={engine}", f"run={tmp_path}/{engine}"] for engine in engines]
        shown = [[*run[:1], f"{run[1]}-shown", "train.sample_every=64"] for run in plain]
        launcher.run(world, *plain, *shown)
        for engine in engines:
            assert metrics(tmp_path / engine) == metrics(tmp_path / f"{engine}-shown")
            plain_weights, shown_weights = (
                tensors(tmp_path / name / "checkpoints/000000000640") for name in (engine, f"{engine}-shown")
            )
            assert all((plain_weights[name] == shown_weights[name]).all() for name in plain_weights)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler: apt-get install g++")
def test_compiled_blocks_have_the_gradients_of_eager_ones(tiny, tmp_path):
    """For single images and groups, and with the strides that the patch embedding really gives."""
    images = open_images(DataConfig())
    gradients = []
    for compiled in ("false", "true"):
        config = load_config(tiny, ["engine=single", f"compile={compiled}", f"run={tmp_path}"])
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
    for eager, compiled in zip(*gradients, strict=True):
        assert torch.allclose(eager, compiled, atol=1e-5, rtol=1e-4)
