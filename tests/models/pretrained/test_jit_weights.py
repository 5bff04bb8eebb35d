"""JiT's weights give our network the outputs of JiT's code, and come back bit for bit."""

import random

import pytest
import torch

from models.backbones.jit import JiT
from models.backbones.registry import model_config
from models.paths.registry import path_config
from models.pretrained.jit_weights import to_jit
from models.pretrained.published import convert, recognise
from tests.published import CHANNELS, CLASSES
from tests.published_jit_module import Denoiser, make_jit

RANDOM = random.SystemRandom()
SHAPES = ({}, {"patch": 3, "heads": 2, "hidden": 21}, {"context": 0}, {"start": 2, "depth": 4, "width": 32, "heads": 4})


@pytest.fixture
def published(random_weights):
    return lambda **changes: make_jit(RANDOM.randrange(2**31), random_weights, **changes)


def ours(weights, start=1):
    """Our network of converted weights, built from what the conversion says of it but for its `start`."""
    weights, config = convert(weights, "jit")
    model = JiT.Config(**{"context_start": start, **config["model"]})
    network = JiT(model, config["data"]["channels"], config["data"]["side"], CLASSES)
    network.load_state_dict(weights)
    return network.requires_grad_(False), config


@pytest.mark.parametrize("changes", SHAPES)
def test_a_converted_network_predicts_what_the_published_one_does(published, changes):
    theirs, weights = published(**changes)
    network, config = ours(weights, changes.get("start", 1))
    x, t, label = torch.randn(7, CHANNELS, 6, 6), torch.rand(7), torch.arange(7) % (CLASSES + 1)
    expected = theirs(x, t, label)
    found = network(x, t, label.where(label < CLASSES, torch.tensor(-1)), torch.zeros_like(label))
    assert expected.abs().max() > 0.5
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert config["path"] == {"name": "jit", "noise_scale": 1.0} and config["data"] == {"channels": 3, "side": 6}
    assert config["model"]["heads"] == changes.get("heads", 3) and config["model"]["max_group_size"] == 0


@pytest.mark.parametrize("changes", SHAPES)
def test_there_and_back_all_is_the_same_bit_for_bit(published, changes):
    _, weights = published(**changes)
    converted, config = convert(weights, "jit")
    assert (recognise(weights), recognise(converted)) == ("jit", "ours")
    model = model_config({**config["model"], "context_start": changes.get("start", 1)})
    back = to_jit(converted, model, path_config(config["path"]), 6)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in weights.items() if "pos_embed" not in name)
    assert (back["net.pos_embed"] - weights["net.pos_embed"]).abs().max() < 1e-6
    again, _ = convert(back, "jit")
    assert again.keys() == converted.keys() and all(torch.equal(again[name], converted[name]) for name in again)
    Denoiser(**changes).load_state_dict(back)


def test_a_group_network_of_one_row_is_folded_and_of_more_is_refused(random_jit, random_inputs):
    one, many = random_jit(0, max_group_size=1, mlp="swiglu", patch=2), random_jit(0, max_group_size=4, patch=2)
    x, t, label, slot = random_inputs(0, 4, 1)
    theirs = Denoiser()
    theirs.load_state_dict(to_jit(one.state_dict(), one.config, path_config("jit"), 6))
    found = theirs(x, t, label.where(label >= 0, torch.tensor(CLASSES)))
    torch.testing.assert_close(found, one(x, t, label, torch.zeros_like(slot)), rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match=r"^model\.max_group_size=4: JiT's class is for 1 alone"):
        to_jit(many.state_dict(), many.config, path_config("jit"), 6)
    with pytest.raises(ValueError, match=r"^path=linear: JiT's class is for jit alone"):
        to_jit(one.state_dict(), one.config, path_config("linear"), 6)


@pytest.mark.parametrize("size", JiT.Config.sizes)
@pytest.mark.parametrize(("patch", "side"), [(16, 256), (32, 512)])
def test_a_published_size_tells_all_of_the_network_and_its_noise(size, patch, side, monkeypatch):
    values = JiT.Config.sizes[size]
    shape = {name: values[name] for name in ("depth", "width", "heads", "bottleneck")}
    with torch.device("meta"):
        hidden = int(4 * values["width"] * 2 / 3)
        weights = Denoiser(
            **shape, start=1, context=32, hidden=hidden, patch=patch, side=side, classes=1000
        ).state_dict()
    monkeypatch.setattr("models.pretrained.jit_weights.cells_of", lambda positions, width: 16)  # values are not there
    config = convert(weights, "jit").config
    assert config["model"]["size"] == size and not config["model"].keys() & values.keys()
    assert config["path"]["noise_scale"] == side / 256 and config["data"] == {"channels": 3, "side": side}
    assert config["model"].get("dropout", 0) == (0.2 if size in "HG" else 0)
    model = JiT.Config(**config["model"])
    assert (model.context_start, model.mlp_ratio) == (values["context_start"], 4.0)
    told = convert(weights, "jit", {"noise_scale": 3.0, "proj_dropout": 0.1}).config
    assert (told["path"]["noise_scale"], told["model"]["dropout"]) == (3.0, 0.1)


def test_the_tensor_that_is_missing_unexpected_or_of_a_wrong_shape_is_named(published):
    _, weights = published()
    for name, tensor in weights.items():
        bare = name.removeprefix("net.")
        without = {other: value for other, value in weights.items() if other != name}
        if bare != "in_context_posemb":
            with pytest.raises(ValueError, match=f"^{bare} "):
                convert(without, "jit")
        longer = torch.cat([tensor, tensor])
        if "embedding_table" not in name and "posemb" not in name and "q_norm" not in name:
            with pytest.raises(ValueError) as caught:
                convert(weights | {name: longer}, "jit")
            assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"^registers is unexpected in weights of jit"):
        convert(weights | {"net.registers": torch.zeros(2)}, "jit")
    with pytest.raises(ValueError, match="of another resolution"):
        convert(weights | {"net.pos_embed": weights["net.pos_embed"].flip(1)}, "jit")
