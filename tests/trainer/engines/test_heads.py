"""All engines train heads and groups of parameters with their own settings alike, and resume what others saved."""

import json

import pytest
import torch

from data.sets.form import ImageForm
from tests.trainer.engines.with_heads import STEPS, Training, begin, resume
from tests.trainer.forked import GROUPS
from tests.trainer.go_on import stored
from trainer.checkpoints import folder as checkpoint
from trainer.config.tree import load_config
from trainer.engines.build import build_engine
from trainer.errors import RunError
from trainer.ranks import process_group

RULE = ["optim.decay=matrices", "optim.weight_decay=5", "optim.ema=[0.9,0.5]"]
ENGINES = {
    "single": (1, ["engine=single"]),
    "ddp": (2, ["engine=ddp"]),
    "fsdp": (2, ["engine=fsdp"]),
    "hsdp": (2, ["engine=hsdp", "shard_size=1"]),
    **{f"zero{stage}": (2, ["engine=deepspeed", f"zero={stage}"]) for stage in range(4)},
    **{f"zero{stage}-groups": (2, ["engine=deepspeed", f"zero={stage}", GROUPS]) for stage in (2, 3)},
}


def worlds():
    return {world: [name for name, (ranks, _) in ENGINES.items() if ranks == world] for world in (1, 2)}


@pytest.fixture(scope="module")
def begun(module_ranks, tmp_path_factory):
    """A run of each engine: six steps, and a checkpoint after three; another one in which all parameters decay."""
    folder = tmp_path_factory.mktemp("heads")
    module_ranks.run(1, begin, "engine=single", *RULE[1:], f"run={folder}/all-decay")
    for world, names in worlds().items():
        runs = ([*ENGINES[name][1], *RULE, f"run={folder}/from-{name}"] for name in names)
        module_ranks.run_many(world, begin, *runs)
    return folder


def rows(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def test_all_engines_train_heads_and_groups_of_parameters_alike(begun):
    expected = rows(begun, "from-single")
    assert abs(rows(begun, "all-decay")[-1][0] - expected[-1][0]) > 1e-4, "the rule makes a difference"
    for name in ENGINES:
        for step, (a, b) in enumerate(zip(rows(begun, f"from-{name}"), expected, strict=True)):
            assert a == pytest.approx(b, abs=1e-5, rel=0), (name, step)


def test_all_engines_save_the_same_weights_averages_and_moments(begun):
    """After three steps. The rule makes a difference to them."""

    def saved(name):
        return stored(checkpoint.find(begun / name / "checkpoints")[0][-1])

    expected, everything = saved("from-single"), saved("all-decay")
    assert {name.partition(".")[0] for name in expected} == {"model", "heads", "ema", "ema_0", "optimizer"}
    differing = [name for name in expected if not torch.allclose(expected[name], everything[name], rtol=0, atol=1e-6)]
    assert {name.partition(".")[0] for name in differing} >= {"model", "ema", "ema_0"}
    for name in ENGINES:
        found = saved(f"from-{name}")
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            assert torch.allclose(found[key], tensor, rtol=1e-4, atol=1e-6), (name, key)


def test_every_engine_resumes_what_every_engine_saved(ranks, begun):
    """What is loaded is what is stored, bit for bit; the three next losses are those of the run that did not stop."""
    for world, names in worlds().items():
        ranks.run_many(world, resume, *([*ENGINES[name][1], *RULE, f"run={begun}/{name}"] for name in names))
        for name in names:
            results = rows(begun, name)
            assert len(results) == len(ENGINES)
            for source, found in results.items():
                for a, b in zip(found, rows(begun, source)[STEPS:], strict=True):
                    assert a == pytest.approx(b, abs=1e-5, rel=0), (source, name)
            assert results[f"from-{name}"] == rows(begun, f"from-{name}")[STEPS:], f"{name} resumes bit for bit"


def test_heads_in_bf16(ranks, begun, tmp_path):
    """With what the network gives them in bf16 or fp32; losses are near those of fp32."""
    names = ["ddp", "fsdp", "zero1", "zero3"]
    runs = ([*ENGINES[name][1], *RULE, "precision=bf16", f"run={tmp_path}/{name}"] for name in names)
    ranks.run_many(2, begin, *runs)
    expected = [loss for loss, _ in rows(begun, "from-single")]
    for name in names:
        found = [loss for loss, _ in rows(tmp_path, name)]
        assert found != expected
        assert found == pytest.approx(expected, abs=0.01), name


def test_a_checkpoint_without_the_heads_is_refused(tiny, tmp_path):
    config = load_config(tiny, ["engine=single", f"run={tmp_path}"])
    with process_group() as ranks:
        run = Training(config, ranks)
        plain = {part: tensors for part, tensors in run.engine.state().items() if part != "heads"}
        checkpoint.save(tmp_path, 32, plain, "", ImageForm((1, 8, 8), 10, None, "images"))
        with pytest.raises(RunError, match=r"heads\.all\.0\.weight is nothing"):
            checkpoint.load(checkpoint.find(tmp_path)[0][-1], run.engine.state())


def test_without_heads_the_state_knows_none(tiny, tmp_path):
    config = load_config(tiny, ["engine=single", f"run={tmp_path}"])
    with process_group() as ranks:
        run = Training(config, ranks)
        with_heads, network = run.engine.state(), run.engine.network
        plain = build_engine(config, config.optim, network, ranks).state()
    assert list(plain) == ["model", "ema", "optimizer"]
    assert set(with_heads) - set(plain) == {"heads"}
    names = {f"heads.{name}" for name in with_heads["heads"]}
    assert with_heads["optimizer"]["state"].keys() - plain["optimizer"]["state"].keys() == names
    assert with_heads["ema"].keys() == plain["ema"].keys()
