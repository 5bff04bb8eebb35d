import itertools
import json
import re

import pytest
import torch
from torch import nn

from data.sets.registry import DataConfig, open_images
from tests.trainer.forked import train_tiny
from trainer.build import build_network
from trainer.checkpoints.weights import WeightSource, find_checkpoint, find_source
from trainer.config.strict_yaml import dump, parse
from trainer.config.tree import load_config
from trainer.engines.ema import EMA
from trainer.errors import RunError
from trainer.ranks import Ranks
from trainer.run_folder import check_folder, write_config
from trainer.sampling.generate import generate
from trainer.sampling.networks import Networks
from trainer.sampling.pictures import to_uint8
from trainer.sampling.samples import make_samples
from trainer.sampling.sweep import parse_axes, run_sweep


@pytest.mark.parametrize("seed", range(3))
def test_ema_equals_the_closed_form(seed):
    torch.manual_seed(seed)
    decay, steps = 0.9, 17
    layer = nn.Linear(5, 3)
    ema = EMA(dict(layer.named_parameters()), lambda step: decay)
    history = [layer.weight.detach().double().clone()]
    for step in range(steps):
        with torch.no_grad():
            layer.weight.add_(torch.randn(3, 5))
        ema.update(step + 1)
        history.append(layer.weight.detach().double().clone())
    expected = decay**steps * history[0]
    expected += sum((1 - decay) * decay ** (steps - k) * history[k] for k in range(1, steps + 1))
    assert torch.allclose(ema.average["weight"].double(), expected, atol=1e-6)


def test_the_ema_of_a_sharded_run_equals_the_closed_form_of_its_weights(ranks, tensors, tmp_path):
    """Of each decay, with shards that do not divide evenly: the label table has 11 rows."""
    run = tmp_path / "run"
    overrides = ["checkpoint.every=32", "model.width=36", "model.heads=3", "train.images=320", "optim.ema=[0.9,0.5]"]
    ranks.run(2, train_tiny, f"run={run}", *overrides)
    checkpoints = [tensors(path) for path in sorted((run / "checkpoints").iterdir())]
    first = checkpoints[0]
    weights = [name.removeprefix("model.") for name in first if name.startswith("model.")]
    for part, decay in (("ema", 0.9), ("ema_0.5", 0.5)):
        for name in weights:
            average = first[f"{part}.{name}"].double()
            for state in checkpoints[1:]:
                average = decay * average + (1 - decay) * state[f"model.{name}"].double()
            assert torch.allclose(checkpoints[-1][f"{part}.{name}"].double(), average, atol=1e-6), (part, name)


@pytest.fixture(scope="module")
def run(module_ranks, tmp_path_factory):
    """Its averages are far from the weights, and from one another."""
    run = tmp_path_factory.mktemp("averages") / "run"
    overrides = ["optim.lr=1e-2", "optim.warmup=0", "optim.ema=[0.99,0.9]", "optim.power_ema=[0.1]"]
    module_ranks.run(1, train_tiny, f"run={run}", *overrides)
    return run


def test_samples_come_from_the_average_that_is_named(run, tensors, tmp_path):
    """They are those of a network that holds it, and the record names it."""
    config, checkpoint, images = load_config(run / "config.yaml"), find_checkpoint(run), open_images(DataConfig())
    network, stored, made = build_network(config, images), tensors(checkpoint), []
    named = {None: "ema", "ema": "ema", "model": "model", "raw": "model", "ema_0.9": "ema_0.9", "ema-0.1": "ema-0.1"}
    for name, part in named.items():
        pixels, _, record = make_samples(find_source(checkpoint, name), config)
        assert record["weights"] == part
        network.load_state_dict({n.removeprefix(f"{part}."): v for n, v in stored.items() if n.startswith(f"{part}.")})
        expected = to_uint8(generate(Networks(network), config, images, Ranks(0, 1, torch.device("cpu")))[0])
        assert (pixels == expected).all(), name
        made.append(pixels)
    assert all((a != b).mean() > 0.1 for a, b in itertools.combinations((made[i] for i in (0, 2, 4, 5)), 2))
    assert find_source(checkpoint) == WeightSource(checkpoint) == find_source(checkpoint, "ema")
    assert find_source(checkpoint, raw=True) == find_source(checkpoint, "raw") == WeightSource(checkpoint, "model")


def test_a_sweep_goes_over_averages_and_makes_none_twice(run, tmp_path):
    measured = []

    def measure(folder):
        measured.append(json.loads((folder / "samples.json").read_text())["weights"])
        return {"time": (folder / "samples.json").stat().st_mtime_ns}

    axes = parse_axes(["weights=ema,ema_0.9,raw"])
    first, again = (run_sweep(find_checkpoint(run), axes, [], tmp_path / "sweep", measure) for _ in range(2))
    assert measured == 2 * ["ema", "ema_0.9", "model"] and first == again
    with pytest.raises(RunError, match=r"^--weights ema_0.8: .* give model or ema or ema_0.9 or ema-0.1, or a file$"):
        run_sweep(find_checkpoint(run), parse_axes(["weights=ema,ema_0.8"]), [], tmp_path / "other", measure)
    assert not (tmp_path / "other").exists()


def test_weights_that_are_not_there_are_one_line(run, tmp_path):
    checkpoint = find_checkpoint(run)
    for name in ("ema_0.99", "ema_", "em", "heads", "optimizer", "mo", str(tmp_path / "weights.safetensors")):
        with pytest.raises(
            RunError, match=rf"^--weights {re.escape(name)}: no such file, nor part of {checkpoint}; give"
        ):
            find_source(checkpoint, name)
    with pytest.raises(RunError, match=r"^--raw: not with --weights ema_0.9, .*; leave one of them out$"):
        find_source(checkpoint, "ema_0.9", raw=True)
    with pytest.raises(RunError, match=r"^--weights ema_0.9: no such file; give one that there is$"):
        find_source(None, "ema_0.9")


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ("[0.9,0.9]", r"^optim.ema=\[0.9, 0.9\]: two averages of one decay are the same; give each once"),
        ("[0.999,0.9,9e-1]", r"^optim.ema=\[0.999, 0.9, 0.9\]: two averages of one decay"),
        ("[]", r"^optim.ema=\[\]: .* at least 1"),
        ("1", r"^optim.ema.0=1: .* less than 1"),
        ("[0.9,1.5]", r"^optim.ema.1=1.5: .* less than 1"),
        ("many", r"^optim.ema.0=many: .* number"),
    ],
)
def test_decays_that_cannot_be_are_one_line(value, line):
    with pytest.raises(RunError, match=line) as caught:
        load_config("tests/trainer/tiny.yaml", [f"optim.ema={value}"])
    assert "\n" not in str(caught.value)


def test_one_number_and_a_list_of_it_are_the_same_run(tmp_path):
    """Older versions stored a number."""
    written = {value: load_config("tests/trainer/tiny.yaml", [f"optim.ema={value}"]) for value in ("0.5", "[0.5]")}
    assert written["0.5"] == written["[0.5]"] and written["0.5"].optim.ema == (0.5,)
    write_config(config := load_config("tests/trainer/tiny.yaml", [f"run={tmp_path}", "optim.ema=0.5"]))
    stored = tmp_path / "config.yaml"
    tree = parse(stored.read_text()) | {"optim": parse(stored.read_text())["optim"] | {"ema": 0.5}}
    for removed in ("schedule", "decay_images", "final_lr"):
        del tree["optim"][removed]
    stored.write_text(dump(tree))
    check_folder(config)
    with pytest.raises(RunError, match=r"optim.ema=.*0.5, 0.6.*has optim.ema="):
        check_folder(load_config("tests/trainer/tiny.yaml", [f"run={tmp_path}", "optim.ema=[0.5,0.6]"]))
