"""Scores of the attention in groups, while training on real ranks and of single calls."""

import json
import math

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from models.backbones.registry import make_network, model_config
from models.paths.flows import LinearFlow
from tests.trainer.forked import train_tiny
from trainer.analysis.cross_attention import EDGES, as_record, mean_attention, watched

ENGINES = {  # name -> (ranks, overrides)
    "single": (1, ["engine=single"]),
    "ddp": (2, ["engine=ddp"]),
    "fsdp": (2, ["engine=fsdp", "activation_checkpointing=1", "train.micro_batch=4"]),
    "zero3": (2, ["engine=deepspeed", "zero=3"]),
}
RUN = ["groups.size=4", "groups.splits=4", "groups.window=[-2,9]", "train.images=128", "checkpoint.every=64"]


@pytest.fixture(scope="module")
def runs(module_ranks, tmp_path_factory):
    """Of each engine a run that measures it at every second step, and one without."""
    folder = tmp_path_factory.mktemp("runs")
    for world in (1, 2):
        module_ranks.run_many(
            world,
            train_tiny,
            *(
                [*RUN, *overrides, f"run={folder}/{name}-{every}", f"train.attention_every={every}"]
                for name, (ranks, overrides) in ENGINES.items()
                for every in (64, 0)
                if ranks == world
            ),
        )
    return folder


def board(run):
    """What TensorBoard shows of the attention: {name: [(position, value), ...]}, and its pictures' positions."""
    events = EventAccumulator(str(run), size_guidance={"images": 0}).Reload()
    names = [name for name in events.Tags()["scalars"] if name.startswith("attention/")]
    scalars = {name: [(event.step, event.value) for event in events.Scalars(name)] for name in names}
    return scalars, {name: [image.step for image in events.Images(name)] for name in events.Tags()["images"]}


@pytest.mark.parametrize("engine", ENGINES)
def test_measuring_leaves_training_as_it_is_bit_for_bit(runs, same, engine):
    same(runs / f"{engine}-64", runs / f"{engine}-0", engine, "checkpoints/000000000128")


@pytest.mark.parametrize("engine", ENGINES)
def test_tensorboard_shows_them_and_they_depend_on_no_engine(runs, engine):
    scalars, pictures = board(runs / f"{engine}-64")
    assert pictures == {"attention/by_layer_and_level": [64, 128]}
    expected, _ = board(runs / "single-64")
    assert scalars.keys() == {"attention/s_cross", "attention/cross_share"} == expected.keys()
    for name, values in scalars.items():
        assert [position for position, _ in values] == [64, 128]
        assert values == [(position, pytest.approx(value, abs=1e-5)) for position, value in expected[name]]
    assert all(0 < value < 2 / 3 for _, value in scalars["attention/s_cross"])
    assert all(0.5 < value < 1 for _, value in scalars["attention/cross_share"])
    assert board(runs / f"{engine}-0") == ({}, {})


@pytest.fixture
def network(random_weights):
    def make(backbone="dit", **changes):
        jit = {"context_start": 1} if backbone == "jit" else {}
        config = model_config({"backbone": backbone, "depth": 3, "width": 24, "heads": 3, **jit, **changes})
        return random_weights(make_network(config, 2, 6, 5, 2), 0)

    return make


def call(seed, log_snr, group_size):
    """Inputs of a network, the log-SNR of each group given."""
    generator = torch.Generator().manual_seed(seed)
    images = len(log_snr) * group_size
    x = torch.randn(images, 2, 6, 6, generator=generator)
    t = torch.sigmoid(torch.tensor(log_snr) / 2).repeat_interleave(group_size)
    slot = torch.cat([torch.randperm(16, generator=generator)[:group_size] for _ in log_snr])
    return x, t, torch.randint(-1, 5, (images,), generator=generator), slot


def measured(network, inputs, group_size, grouped=None):
    sums = []
    with torch.no_grad():
        out = watched(network, LinearFlow(), sums)(*inputs, group_size, grouped)
    return out, sums


@pytest.mark.parametrize("backbone", ["dit", "jit"])
@pytest.mark.parametrize("seed", range(3))
def test_a_cell_is_the_mean_of_its_groups(network, seed, backbone):
    net, size = network(backbone), 3
    log_snr = [-9.0, -5.1, -4.9, -4.0, 0.0, 0.5, 1.1, 4.9, 5.1, 8.0]
    buckets = [0, 0, 1, 1, 3, 3, 4, 5, 6, 6]
    inputs = call(seed, log_snr, size)
    out, sums = measured(net, inputs, size)
    with torch.no_grad():
        assert torch.equal(out, net(*inputs, size))
    attention = mean_attention(sums[0])
    assert attention.groups.tolist() == [2, 2, 0, 2, 1, 1, 2] and len(EDGES) == 6
    alone = []
    for i in range(len(log_snr)):
        _, one = measured(net, [part[i * size : (i + 1) * size] for part in inputs], size)
        alone.append(mean_attention(one[0]))
    for bucket in range(7):
        mine = [one for one, where in zip(alone, buckets, strict=True) if where == bucket]
        for name in ("s_cross", "cross_share"):
            found = getattr(attention, name)[:, bucket]
            if mine:
                expected = torch.stack([getattr(one, name)[:, bucket] for one in mine]).mean(dim=0)
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
            else:
                assert found.isnan().all()
    assert attention.mean_s_cross == pytest.approx(sum(one.mean_s_cross for one in alone) / len(alone), abs=1e-6)
    assert attention.mean_cross_share == pytest.approx(
        sum(one.mean_cross_share for one in alone) / len(alone), abs=1e-6
    )


def test_groups_that_should_not_share_do_not_count(network):
    net, inputs = network(), call(0, [-4.0, 0.0, 4.0], 2)
    first = mean_attention(measured(net, [part[:4] for part in inputs], 2)[1][0])
    found = mean_attention(measured(net, inputs, 2, grouped=4)[1][0])
    assert found.groups.tolist() == first.groups.tolist() == [0, 1, 0, 1, 0, 0, 0]
    torch.testing.assert_close(found.cross_share, first.cross_share, rtol=0, atol=1e-6, equal_nan=True)
    none = mean_attention(measured(net, inputs, 2, grouped=0)[1][0])
    assert none.groups.sum() == 0 and math.isnan(none.mean_s_cross)


def test_images_alone_are_not_measured(network):
    net, inputs = network(), call(0, [0.0, 1.0], 1)
    out, sums = measured(net, inputs, 1)
    with torch.no_grad():
        assert sums == [] and torch.equal(out, net(*inputs))


def test_layers_without_groups_and_empty_levels_are_null(network):
    _, sums = measured(network(group_layers=(0, 2)), call(0, [0.0, 0.1], 3), 3)
    record = json.loads(json.dumps(as_record(mean_attention(sums[0]), 3), allow_nan=False))
    table = record["cross_share_by_layer_and_level"]
    assert [[level for level, value in enumerate(row) if value is not None] for row in table] == [[3], [], [3]]
    assert record["cross_share"] == pytest.approx((table[0][3] + table[2][3]) / 2)
    assert record["uniform_cross_share"] == pytest.approx(2 / 3) and record["groups_by_level"] == [0, 0, 0, 2, 0, 0, 0]
