"""The estimate against published figures and closed forms."""

import pytest

from trainer.config.tree import parse_config
from trainer.estimate import estimate, estimate_table

XL = {"model": {"size": "XL", "patch": 2}}


class Latents:
    """What the estimate asks of images."""

    shape, num_classes = (4, 32, 32), 1000


def config(**changes):
    tree = {"run": "r", "model": {"size": "S", "patch": 2}, "groups": {"variant": "none", "size": 1}, **changes}
    return parse_config(tree)


def test_dit_xl_2_has_the_published_size_and_flops():
    """Peebles & Xie 2023, table 4: 675 M parameters, 118.6 G multiply-adds forward. Ours predicts no sigma."""
    e = estimate(config(**XL), Latents(), 8, 0.5)
    assert e["parameters"] == pytest.approx(675e6, rel=0.005)
    assert e["flops_per_step"] == pytest.approx(256 * 3 * 2 * 118.6e9, rel=0.01)


def test_attention_of_groups_costs_what_it_adds():
    """Of N images each token sees N times as many others: 2 (N - 1) depth tokens^2 width more multiply-adds."""
    plain = estimate(config(), Latents(), 1, 0.5)
    grouped = config(groups={"variant": "light", "size": 4, "share": 0.5, "query": "class"})
    more = estimate(grouped, Latents(), 1, 0.5)["flops_per_step"] - plain["flops_per_step"]
    assert more == pytest.approx(256 * 3 * 2 * 0.5 * (4 - 1) * 2 * 12 * 256**2 * 384, rel=1e-3)


@pytest.mark.parametrize("world_size", [2, 8])
def test_memory_and_communication_by_engine(world_size):
    ddp, fsdp = (estimate(config(engine=engine), Latents(), world_size, 0.5) for engine in ("ddp", "fsdp"))
    assert ddp["states"] == 20 * ddp["parameters"] == world_size * fsdp["states"]
    assert fsdp["communication"] == pytest.approx(1.5 * ddp["communication"])
    assert ddp["communication"] == pytest.approx(2 * (world_size - 1) / world_size * 4 * ddp["parameters"])
    assert ddp["gathered"] == 0 < fsdp["gathered"] < fsdp["parameters"]


def test_sharding_divides_what_each_engine_promises():
    def of(engine, **more):
        e = estimate(config(engine=engine, **more), Latents(), 8, 0.5)
        return [e["states"] / e["parameters"], e["communication"] / e["parameters"] / 4]

    assert of("hsdp") == of("fsdp") == of("hsdp", shard_size=8) == [20 / 8, 3 * 7 / 8]
    assert of("hsdp", shard_size=2) == [20 / 2, 3 / 2 + 2 * 3 / 4 / 2]
    assert of("hsdp", shard_size=1) == of("ddp") == of("deepspeed", zero=0)
    assert of("deepspeed", zero=1) == [4 + 4 + 4 + 8 / 8, 2 * 7 / 8]  # weights, gradients, EMA; moments
    assert of("deepspeed", zero=2) == [4 + 4 + 12 / 8, 2 * 7 / 8]
    assert of("deepspeed", zero=3) == [20 / 8, 3 * 7 / 8]
    assert of("ddp", optim={"power_ema": [0.05, 0.1]})[0] == 28


def test_recomputed_blocks_keep_their_inputs():
    kept = [estimate(config(activation_checkpointing=k), Latents(), 8, 0.5)["activations"] for k in (0, 1, 2, 12)]
    assert [round(12 * 17 * k / kept[0], 6) for k in kept] == [12 * 17, 12 + 17, 6 * 17 + 6 + 17, 11 * 17 + 1 + 17]


def test_time_follows_from_rate_and_micro_batches_bound_activations():
    a = estimate(config(precision="bf16"), Latents(), 8, 0.4)
    b = estimate(config(precision="bf16", train={"micro_batch": 4, "images": 1000}), Latents(), 8, 0.4)
    assert (
        a["images_per_second"]
        == b["images_per_second"]
        == pytest.approx(8 * 989e12 * 0.4 / (a["flops_per_step"] / 256))
    )
    assert a["days"] == pytest.approx(102_400_000 / a["images_per_second"] / 86400)
    assert a["activations"] == 8 * b["activations"]


def test_the_table_names_what_it_assumes():
    table = estimate_table(config(**XL), Latents(), 4, 0.25)
    assert "on 4 ranks at 25%" in table and "days to 102,400,000 images" in table and "674.8 M" in table
