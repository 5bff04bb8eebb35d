"""The estimate against published figures, closed forms and what ranks really exchange."""

import json
import math
from collections import Counter

import pytest
import torch

from models.backbones.passes import count_passes
from tests.in_process import call
from tests.trainer.estimate.exchanges import record
from tests.trainer.forked import TINY
from trainer.build import build_network, open_data
from trainer.config.tree import load_config, parse_config
from trainer.errors import RunError
from trainer.estimate.advice import advice, options
from trainer.estimate.communication import exchanges, exposed_seconds, total_moved, total_seconds
from trainer.estimate.hardware import GPUS, Cluster, Interconnect, Utilisation, read_interconnect, read_utilisation
from trainer.estimate.memory import BF16_SHARE, memory
from trainer.estimate.step import estimate
from trainer.estimate.table import estimate_table
from trainer.estimate.work import count_work, micro_batches

XL = {"model": {"size": "XL", "patch": 2}}
LINK = Interconnect(400e9, 50e9)
USED = Utilisation(0.2, 0.35)
DEFAULT = "configs/imagenet256/sit/sit-xl-2-light-4.yaml"


class Latents:
    """What the estimate asks of images."""

    shape, num_classes = (4, 32, 32), 1000


class SmallLatents:
    """Those of VA-VAE, which LightningDiT is trained on."""

    shape, num_classes = (32, 16, 16), 1000


def config(**changes):
    tree = {"run": "r", "model": {"size": "S", "patch": 2}, "groups": {"variant": "none", "size": 1}, **changes}
    return parse_config(tree)


def cluster(nodes=1, per_node=8, gpu="h100", link=LINK):
    return Cluster(nodes, per_node, GPUS[gpu], link)


@pytest.fixture(scope="module")
def work():
    return count_work(config(), Latents())


def flops(work):
    return work.forward_flops + work.backward_flops


def test_dit_xl_2_has_the_published_size_and_flops():
    """Peebles & Xie 2023, table 4: 675 M parameters, 118.6 G multiply-adds forward. Ours predicts no sigma."""
    found = count_work(config(**XL), Latents())
    assert found.parameters == pytest.approx(675e6, rel=0.005)
    assert flops(found) == pytest.approx(3 * 2 * 118.6e9, rel=0.01)


def test_attention_of_groups_costs_what_it_adds(work):
    """Of N images each token sees N times as many others: 2 (N - 1) depth tokens^2 width more multiply-adds."""
    grouped = config(groups={"variant": "light", "size": 4, "share": 0.5, "query": "class"})
    more = flops(count_work(grouped, Latents())) - flops(work)
    assert more == pytest.approx(3 * 2 * 0.5 * (4 - 1) * 2 * 12 * 256**2 * 384, rel=1e-3)


def test_recomputed_blocks_pass_forward_twice(work):
    found = count_work(config(activation_checkpointing=3), Latents())
    assert flops(found) == pytest.approx((3 + 1 / 3) / 3 * flops(work))
    assert found.backward_kernels == pytest.approx(work.backward_kernels + work.forward_kernels / 3)


def test_a_block_launches_what_its_operators_are():
    """Five linear layers and attention forward, twice the products and one attention backward; a profile of a CPU
    counts the same layers."""
    before, after = (count_passes(build_network(deep(depth), Latents()), 4, 32) for depth in (2, 3))
    assert after.forward.products - before.forward.products == 6
    assert after.backward.products - before.backward.products == 11
    forward = before.forward
    network, number = build_network(deep(2), Latents()), torch.zeros(1, dtype=torch.long)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        network(torch.zeros(1, 4, 32, 32), number.float(), number, number)
    seen = Counter(event.name for event in profile.events())
    assert forward.products == seen["aten::addmm"] + seen["aten::scaled_dot_product_attention"]
    assert forward.products < forward.all < sum(seen.values())


def deep(depth):
    return config(model={"depth": depth, "width": 384, "heads": 6, "patch": 2})


def test_compiled_networks_launch_less(work):
    compiled = count_work(config(compile=True), Latents())
    assert compiled.forward_kernels < work.forward_kernels and compiled.backward_kernels < work.backward_kernels


@pytest.mark.parametrize("per_node", [2, 8])
def test_sharding_divides_what_each_engine_promises(work, per_node):
    """Bytes of the states per parameter, and numbers that a rank sends per parameter, were the root gathered twice."""

    def of(engine, micro_batch=None, **more):
        tree = config(engine=engine, train={"micro_batch": micro_batch}, **more)
        here = cluster(per_node=per_node)
        sent = total_moved(exchanges(tree, work, here), micro_batches(tree, here.ranks)) / 4 / work.parameters
        return [memory(tree, work, here).states / work.parameters, sent]

    p, once = per_node, (work.parameters - work.in_blocks) / work.parameters
    shared, ring = [20 / p, (3 - once) * (p - 1) / p], 2 * (p - 1) / p
    assert of("hsdp") == of("fsdp") == of("hsdp", shard_size=p) == pytest.approx(shared)
    assert of("hsdp", shard_size=2) == pytest.approx([20 / 2, (3 - once) / 2 + 2 * (p / 2 - 1) / (p / 2) / 2])
    assert of("hsdp", shard_size=1) == of("ddp") == of("deepspeed", zero=0) == pytest.approx([20, ring])
    assert of("deepspeed", zero=1) == pytest.approx([4 + 4 + 4 + 8 / p, ring])  # weights, gradients, EMA; moments
    assert of("deepspeed", zero=2) == pytest.approx([4 + 4 + 12 / p, ring])
    assert of("deepspeed", zero=3) == pytest.approx([20 / p, 3 * (p - 1) / p])
    assert of("ddp", optim={"power_ema": [0.05, 0.1]})[0] == 28
    own = 256 // p
    assert of("ddp", own // 4) == of("ddp") and of("deepspeed", own // 4, zero=1) == of("deepspeed", zero=1)
    assert of("fsdp", own // 4)[1] == pytest.approx((4 * (2 - once) + 1) * (p - 1) / p)


BIG = ["model.width=256", "model.heads=4", "model.depth=3", "model.patch=4"]  # a unit a block, two buckets of DDP
RUNS = {
    "ddp": (2, ["engine=ddp", "precision=bf16"]),
    "fsdp-fp32": (1, ["engine=fsdp", "precision=fp32"]),
    "fsdp": (2, ["engine=fsdp", "precision=bf16"]),
    "hsdp": (2, ["engine=hsdp", "precision=bf16", "shard_size=2"]),
}


def test_ranks_exchange_what_the_formulas_say(ranks, tmp_path):
    """Calls are equal, and bytes but for what FSDP pads. Four ranks on two nodes."""
    overrides = {name: [f"run={tmp_path}/run", *BIG, *options] for name, (_, options) in RUNS.items()}
    ranks.run_many(4, record, *((tmp_path / name, RUNS[name][0], *overrides[name]) for name in RUNS))
    for name, (parts, _) in RUNS.items():
        calls, moved = Counter(), Counter()
        for kind, size, group in json.loads((tmp_path / name).read_text()):
            calls[kind, group] += 1
            moved[kind, group] += size
        tree = load_config(TINY, overrides[name])
        said = exchanges(tree, count_work(tree, open_data(tree)), cluster(2, 2))
        expected_calls, expected_moved = Counter(), Counter()
        for exchange in said:
            times = parts if exchange.in_each else 1
            kind = "allreduce_" if exchange.all_reduce else "_allgather_base_"
            if not exchange.all_reduce and not exchange.in_each:
                kind = "_reduce_scatter_base_"
            expected_calls[kind, exchange.group.ranks] += times * exchange.calls
            expected_moved[kind, exchange.group.ranks] += times * exchange.bytes
        assert calls == expected_calls, name
        assert moved == pytest.approx(expected_moved, rel=1e-3), name


def test_time_of_a_ring(work):
    """One all-reduce of S bytes by P ranks: 2 (P - 1) / P S over the slowest rate, and its latency."""
    found = exchanges(config(engine="ddp"), work, cluster(1, 8))
    moved = 2 * 7 / 8 * 4 * work.parameters
    assert total_seconds(found, 1, LINK) == pytest.approx(moved / 400e9 + found[0].calls * (4.4 + 2 * 1.2 * 7) * 1e-6)
    moved = 2 * 63 / 64 * 4 * work.parameters
    for between, rate in ((100e9, 400e9), (10e9, 80e9)):  # eight adapters a node
        found = exchanges(config(engine="ddp"), work, cluster(8, 8))
        latency = found[0].calls * (4.4 + 2 * (1.2 * 7 + 8.5 * 3)) * 1e-6
        assert total_seconds(found, 1, Interconnect(400e9, between)) == pytest.approx(moved / rate + latency)
    alone = exchanges(config(engine="fsdp"), work, cluster(8, 1))
    assert total_seconds(alone, 1, LINK) == total_seconds(alone, 1, Interconnect(1e9, 50e9)) > 0
    assert total_seconds(exchanges(config(engine="ddp"), work, cluster(1, 1)), 1, LINK) == 0


@pytest.mark.parametrize("engine", ["ddp", "fsdp", "hsdp", "deepspeed"])
@pytest.mark.parametrize("parts", [1, 4])
def test_what_compute_hides(work, engine, parts):
    """No time to hide behind: all is exposed, but for links that work side by side. Enough of it: nothing is, but with
    DeepSpeed, which waits. In between, it never grows."""
    found = exchanges(config(engine=engine), work, cluster(4, 8))
    whole = total_seconds(found, parts, LINK)
    rooms = [exposed_seconds(found, parts, LINK, x, 2 * x) for x in (0, 1e-4, 1e-3, 1e-2, 1e9)]
    assert rooms == sorted(rooms, reverse=True)
    assert rooms[0] == pytest.approx(whole) if engine != "hsdp" else rooms[0] < whole
    assert rooms[-1] == (0 if engine != "deepspeed" else pytest.approx(whole))


@pytest.mark.parametrize("engine", ["ddp", "fsdp", "hsdp", "deepspeed"])
def test_a_step_is_at_best_its_longest_part_and_at_worst_the_sum(work, engine):
    tree = config(engine=engine, precision="bf16")
    for nodes in (1, 2, 4):
        found = estimate(tree, work, cluster(nodes), USED)
        for step, share in ((found.best, 0.35), (found.worst, 0.2)):
            assert step.compute == pytest.approx(256 * flops(work) / (nodes * 8 * 989e12 * share))
            assert step.exposed <= step.communication
        best, worst = found.best, found.worst
        assert max(best.compute, best.launches) + best.update <= best.whole <= worst.whole
        assert worst.whole == pytest.approx(worst.compute + worst.communication + worst.launches + worst.update)
        slower = estimate(tree, work, cluster(nodes, link=Interconnect(200e9, 5e9)), USED)
        assert slower.best.communication > best.communication and slower.best.whole >= best.whole
        lower = estimate(tree, work, cluster(nodes), Utilisation(0.1, 0.2))
        assert lower.best.whole >= best.whole and lower.worst.whole > worst.whole


def test_recomputed_blocks_keep_their_inputs(work):
    kept = [memory(config(activation_checkpointing=k), work, cluster()).activations / 32 / 4 for k in (0, 1, 2, 12)]
    block, inputs = work.kept / 12, 256 * 384
    assert kept == pytest.approx([12 * block, block + 12 * inputs, 7 * block + 6 * inputs, 12 * block + inputs])


@pytest.mark.parametrize("backbone", ["dit", "jit"])
def test_activations_are_what_autograd_keeps(backbone):
    """Counted by the tensors that it really saves: what a second image adds. In bf16 within 15 %."""
    tree = config(model={"backbone": backbone, "depth": 5, "width": 128, "heads": 4, "patch": 4})
    network, counted = build_network(tree, Latents()), count_work(tree, Latents()).kept
    weights = {weight.untyped_storage().data_ptr() for weight in network.parameters()}

    def kept(images, bf16):
        saved = {}

        def keep(tensor):
            memory = tensor.untyped_storage()
            saved.setdefault(memory.data_ptr(), (memory.nbytes(), tensor))  # held, so that no other takes its place
            return tensor

        number = torch.zeros(images, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", enabled=bf16):
            network(torch.randn(images, 4, 32, 32), number.float(), number, number)
        return sum(size for pointer, (size, _) in saved.items() if pointer not in weights)

    assert 4 * counted == pytest.approx(kept(2, False) - kept(1, False), rel=0.01)
    assert BF16_SHARE * 4 * counted == pytest.approx(kept(2, True) - kept(1, True), rel=0.15)


def test_micro_batches_bound_activations(work):
    whole, parts = (config(train={"micro_batch": size}) for size in (None, 4))
    assert memory(whole, work, cluster()).activations == 8 * memory(parts, work, cluster()).activations
    huge = config(train={"micro_batch": 1000})
    assert memory(huge, work, cluster()) == memory(whole, work, cluster())
    both = {"variant": "light", "size": 2, "share": 0.25, "query": "class", "mixing": "within_step"}
    assert [micro_batches(config(groups=both, train={"micro_batch": k}), 8) for k in (None, 32, 8, 6)] == [2, 2, 4, 6]


def test_published_throughput_is_within_a_factor_of_one_and_a_half():
    """At 27 % of the peak, the middle of the default range. LightningDiT-XL/1 (arXiv 2501.01423; its README): 64 epochs
    in 10 hours on 8 H800, a batch of 1024, bf16. fast-DiT's README: 0.84 steps/s of 128 images on an A100, DiT-XL/2,
    fp16, each block recomputed."""
    lightning = config(
        model={"size": "XL", "patch": 1, "mlp": "swiglu"}, engine="ddp", precision="bf16", train={"global_batch": 1024}
    )
    fast = config(**XL, engine="single", precision="bf16", activation_checkpointing=1, train={"global_batch": 128})
    cases = [
        (lightning, SmallLatents(), cluster(gpu="h800"), 64 * 1_281_167 / 36_000 / 8),
        (fast, Latents(), cluster(1, 1, "a100"), 0.84 * 128),
    ]
    for tree, images, machines, published in cases:
        found = count_work(tree, images)
        assert found.parameters == pytest.approx(675e6, rel=0.01)
        of_gpu = tree.train.global_batch / machines.ranks
        middle = estimate(tree, found, machines, Utilisation(0.27, 0.27))
        for step in (middle.best, middle.worst):
            assert 1 / 1.5 < of_gpu / step.whole / published < 1.5
        ends = estimate(tree, found, machines, USED)
        assert of_gpu / ends.worst.whole < published < of_gpu / ends.best.whole


@pytest.fixture(scope="module")
def default():
    """The default of tools/submit.py, and its work."""
    tree = load_config(DEFAULT)
    return tree, count_work(tree, Latents())


def test_the_default_is_a_sensible_job_on_64_gpus(default):
    tree, work = default
    said = advice(tree, work, cluster(8), USED)
    assert said[0] == "4 images on a rank are few: the limit is communication, not compute"
    assert not any(line.startswith("faster") for line in said), said
    assert memory(tree, work, cluster(8)).states < 2e9


def test_advice_names_a_faster_engine_and_fewer_nodes(default):
    tree, work = default
    fsdp = tree.model_copy(update={"engine": "fsdp"})
    found, said = estimate(fsdp, work, cluster(8), USED), advice(fsdp, work, cluster(8), USED)
    assert total_moved(exchanges(fsdp.model_copy(update={"precision": "fp32"}), work, cluster(8)), 1) > 7.9e9
    assert 5.2e9 < found.sent < 5.4e9
    assert found.best.bound_by == "communication" and said[1].startswith("faster: engine=hsdp, ")
    assert said[2].startswith("cheaper: engine=hsdp --nodes ") and said[2].endswith(" of the GPU-hours")
    times = float(said[1].split(", ")[1].split()[0])
    ends = [estimate(c, work, cluster(8), USED) for c in (fsdp, tree)]
    typical = [math.sqrt(e.best.whole * e.worst.whole) for e in ends]
    assert times == pytest.approx(typical[0] / typical[1], abs=0.05) and times > 1.1


def test_advice_is_silent_where_nothing_is_clearly_better(default):
    tree, work = default
    large = parse_config(tree.model_dump() | {"train": {"global_batch": 2048}})
    assert advice(large, work, cluster(8), USED) == []
    assert advice(tree, work, cluster(1), USED) == []


def test_advice_keeps_to_what_can_run(default):
    """Nothing fits into a small GPU but what is sharded; slow links want one node."""
    tree, work = default
    small = Cluster(8, 8, GPUS["h100"]._replace(memory=4e9), LINK)
    ddp = tree.model_copy(update={"engine": "ddp"})
    assert advice(ddp, work, small, USED)[1].startswith("does not fit into a GPU")
    assert not any("engine=ddp" in line for line in advice(tree, work, small, USED))
    slow = advice(tree, work, cluster(8, link=Interconnect(400e9, 0.1e9)), USED)
    assert any(line.startswith("faster: --nodes 1, ") for line in slow)
    pairs = tree.model_copy(update={"shard_size": 64})
    assert advice(pairs, work, cluster(8), USED)[1].startswith("faster: shard_size=null, ")
    host = tree.model_copy(update={"offload": True})
    assert {option.engine for option in options(host, work, cluster(8), USED)} == {"hsdp", "fsdp"}
    eights = tree.model_copy(update={"groups": tree.groups.model_copy(update={"size": 8})})
    found = {(option.engine, option.nodes) for option in options(eights, work, cluster(8), USED)}
    assert found == {(engine, nodes) for engine in ("ddp", "hsdp", "fsdp") for nodes in (1, 2, 4)}  # 8 nodes: 4 a rank


def test_the_table_names_what_it_assumes(work):
    tree = config(precision="bf16")
    table = estimate_table(tree, Latents(), cluster(2, 4, "a100", Interconnect(300e9, 25e9)), Utilisation(0.25, 0.5))
    for said in (
        "compute at 50%, 25% of 312 TFLOP/s",
        "communication at 300 GB/s in a node, 25 between",
        "days to 102,400,000 images",
        f"{work.parameters / 1e6:.1f} M",
        "at best",
        "at worst",
        "bound by",
        "images of a step, of each of 8 ranks",
    ):
        assert said in table, table


def test_interconnect_and_utilisation_have_a_strict_form():
    assert read_interconnect("450.5GB/s+6.25GB/s") == (450.5e9, 6.25e9)
    assert read_utilisation("0.3") == (0.3, 0.3) and read_utilisation(".2-.35") == (0.2, 0.35)
    for text in (
        "400",
        "400GB/s",
        "400GB/s+",
        "400+50",
        "0GB/s+50GB/s",
        "400GB/s + 50GB/s",
        "-1GB/s+1GB/s",
        "1e3GB/s+1GB/s",
    ):
        with pytest.raises(RunError, match=r"^--interconnect .*: should be .*; write as 400GB/s\+50GB/s$"):
            read_interconnect(text)
    with pytest.raises(RunError, match=r"^--interconnect 400Gb/s\+50GB/s: Gb/s are bits; write bytes, as 50GB/s for"):
        read_interconnect("400Gb/s+50GB/s")
    for option in ("--interconnect=400GB", "--utilisation=40"):
        said = call("submit", "--cluster", "local", "--dry-run", option, "configs/digits.yaml", code=1)
        assert said.err.startswith(f"error: {option.replace('=', ' ')}: should be ") and said.err.count("\n") == 1
    for text in ("40", "0", "0.4-0.2", "0.2-", "-0.2", "nan", "0.2-1.5", ""):
        with pytest.raises(RunError, match=r"^--utilisation .*: should be .*; write as 0\.2-0\.35 or 0\.3$"):
            read_utilisation(text)
