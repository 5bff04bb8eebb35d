"""Published weights give our networks the outputs of the published ones; diffusers' class gives ours."""

import random

import pytest
import torch

from models.backbones.dit import DiT
from models.backbones.embeddings import NULL_LABEL
from models.backbones.registry import model_config
from models.paths.registry import path_config
from models.pretrained.published import EQUAL, convert, first_half, recognise, to_diffusers, turn_time
from tests.published import CHANNELS, CLASSES, NETWORKS, SIDE, SLOTS, Denoiser, make

RANDOM = random.SystemRandom()
SAMPLE_TABLE = "sample_embedder.embedding_table.weight"
TURNED = ("repa", "repa without projectors", "groupdiff sit")  # their t = 1 is noise
NAMES = ("t_embedder.mlp.0.weight", "final_layer.linear.weight", "final_layer.linear.bias")


@pytest.fixture
def published(random_weights):
    """make(name, ...) with a random seed: (network, weights as its files name them)."""
    return lambda name, **changes: make(name, RANDOM.randrange(2**31), random_weights, **changes)


def load(weights, config, heads=3):
    """Our network of converted weights, built from what the conversion says of it."""
    model = DiT.Config(**{"heads": heads, **config["model"]})
    path = path_config(config["path"])
    predictions = 2 if path.name == "ddpm" and path.learns_variance else 1
    channels, side = config["data"]["channels"], config["data"]["side"]
    classes = len(weights["y_embedder.embedding_table.weight"]) - 1
    network = DiT(model, channels, side, classes, predictions * channels)
    network.load_state_dict(weights)
    return network.requires_grad_(False)


def inputs(number, path, group=1):
    """x, t and label, some of them unconditional; slots differ in a group."""
    t = torch.randint(1000, (number,)).float() if path == "ddpm" else torch.rand(number)
    label = torch.randint(-1, CLASSES, (number,))
    label[:2] = torch.tensor([NULL_LABEL, 0])
    slot = torch.cat([torch.randperm(SLOTS)[:group] for _ in range(number // group)])
    return torch.randn(number, CHANNELS, SIDE, SIDE), t, label, slot


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("patch", [1, 2])
def test_a_converted_network_predicts_what_the_published_one_does(name, patch, published):
    theirs, weights = published(name, patch=patch)
    ours, config = convert(weights, name.split()[0])
    network = load(ours, config)
    for group in (1, 2, SLOTS) if "groupdiff" in name else (1,):
        x, t, label, slot = inputs(2 * SLOTS, config["path"]["name"], group)
        slot = slot if "groupdiff" in name else torch.zeros_like(slot)
        their_t, sign = (1 - t, -1) if name in TURNED else (t, 1)
        expected = sign * theirs(x, their_t, label.where(label != NULL_LABEL, torch.tensor(CLASSES)), slot, group)
        assert (network(x, t, label, slot, group) - expected).abs().max() < 1e-5 * expected.abs().max()
        assert expected.abs().max() > 0.5 and expected.shape == (*x.shape[:1], network.out_channels, SIDE, SIDE)


@pytest.mark.parametrize("name", NETWORKS)
def test_all_else_is_the_same_bit_for_bit(name, published):
    _, weights = published(name)
    ours, _ = convert(weights, name.split()[0])
    assert all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in ours.values())
    bare = {key.removeprefix("denoiser."): tensor for key, tensor in weights.items()}
    del bare["pos_embed"]
    assert (SAMPLE_TABLE in ours) == ("groupdiff" in name)
    changed = NAMES if name in TURNED else NAMES[1:] if name == "sit" else ()
    for key, tensor in ours.items():
        source = bare.pop(key)
        if key not in changed:
            assert torch.equal(tensor.flatten(), source.flatten()), key
        elif name == "sit":  # token rows are (p, p, 2C): the first C of each pixel stay
            kept = source.view(4, 2 * CHANNELS, -1)[:, :CHANNELS].reshape(tensor.shape)
            assert torch.equal(tensor, kept)
        elif key != NAMES[0]:
            assert torch.equal(-tensor, source)
    assert all(key.startswith("projectors.") for key in bare) and bool(bare) == (name == "repa")


def test_turning_time_twice_changes_nothing(published):
    for _ in range(5):
        _, weights = published("repa")
        once = weights | turn_time(weights, 2, CHANNELS)
        twice = once | turn_time(once, 2, CHANNELS)
        for key in NAMES:
            assert (once[key] - weights[key]).abs().max() > 0.1
            assert (twice[key] - weights[key]).abs().max() < 1e-6


def test_the_half_that_sit_drops_is_that_of_the_variance(published):
    theirs, weights = published("dit")
    network = theirs.eval()
    x, t, *_ = inputs(4, "ddpm")
    label = torch.zeros(4, dtype=torch.long)
    both = network(x, t, label)
    ours = load(*convert({**weights, "pos_embed": weights["pos_embed"]}, "sit"))
    assert torch.allclose(ours(x, t, label, torch.zeros_like(label)), both[:, :CHANNELS], atol=1e-5)
    assert {key: tuple(part.shape) for key, part in first_half(weights, 2, CHANNELS).items()} == {
        "final_layer.linear.weight": (4 * CHANNELS, 24),
        "final_layer.linear.bias": (4 * CHANNELS,),
    }


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("dit", "dit"),
        ("sit", "sit"),
        ("repa", "repa"),
        ("groupdiff dit", "groupdiff"),
        ("groupdiff sit", "groupdiff"),
    ],
)
def test_formats_are_recognised_and_described(name, kind, published):
    _, weights = published(name)
    assert recognise(weights) == kind
    ours, config = convert(weights, kind)
    assert recognise(ours) == "ours"
    assert config["path"] == ({"name": "ddpm", "learns_variance": True} if name.endswith("dit") else {"name": "linear"})
    assert config["data"] == {"channels": CHANNELS, "side": SIDE}
    slots = SLOTS if kind == "groupdiff" else 0
    sizes = {"depth": 2, "width": 24, "patch": 2, "mlp_ratio": 4.0, "max_group_size": slots, "time_scale": 1.0}
    assert config["model"] == sizes


@pytest.mark.parametrize("name", ["dit of the noise alone", "sit of one half", "repa without projectors"])
def test_what_could_be_of_three_formats_is_not_guessed(name, published):
    with pytest.raises(ValueError, match="say --from which it is"):
        recognise(published(name)[1])


@pytest.mark.parametrize("size", DiT.Config.sizes)
def test_a_published_size_tells_depth_width_and_heads(size):
    values = DiT.Config.sizes[size]
    width = values["width"]
    with torch.device("meta"):
        weights = Denoiser(**NETWORKS["dit"], **values, hidden=4 * width, classes=1000).state_dict()
    del weights["pos_embed"]  # of which the values are looked at
    config = convert(weights, "dit").config["model"]
    assert config["size"] == size and not config.keys() & values.keys()
    assert DiT.Config(**config).heads == values["heads"]


def test_the_older_files_of_repa_count_their_blocks_twice(published):
    _, weights = published("repa", depth=5)
    depth = RANDOM.randint(1, 4)

    def older(key):
        head, _, rest = key.partition(".")
        number, _, rest = rest.partition(".")
        late = head == "blocks" and int(number) >= depth
        return f"decoder_blocks.{int(number) - depth}.{rest}" if late else key

    same, expected = convert({older(k): v for k, v in weights.items()}, "repa"), convert(weights, "repa")
    assert same.config == expected.config and same.weights.keys() == expected.weights.keys()
    assert all(torch.equal(tensor, expected.weights[key]) for key, tensor in same.weights.items())


def error_of(weights, kind) -> str:
    with pytest.raises(ValueError) as caught:
        convert(weights, kind)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_tensor_that_is_missing_unexpected_or_of_a_wrong_shape_is_named(name, published):
    kind, prefix = name.split()[0], "denoiser." if "groupdiff" in name else ""
    _, weights = published(name)
    needed = [key for key in weights if not key.startswith("projectors.") and "pos_embed" not in key]
    for key in needed:
        bare = key.removeprefix(prefix)
        without = {other: tensor for other, tensor in weights.items() if other != key}
        if "sample_embedder" not in key:  # without it the network is a plain one
            assert f"{bare} is missing" in error_of(without, kind)
        longer = torch.cat([weights[key], weights[key]])[: len(weights[key]) + 1]
        if "embedding_table" not in key:  # these are as long as there are classes or slots
            message = error_of(weights | {key: longer}, kind)
            if bare in ("x_embedder.proj.weight", "blocks.0.mlp.fc1.weight"):  # these say how wide all others are
                assert bare.removesuffix("weight") in message
            else:
                assert f"{bare} is {tuple(longer.shape)}" in message
        wider = torch.zeros(*weights[key].shape, 2)
        assert error_of(weights | {key: wider}, kind)
    more = RANDOM.choice(["cross_attn.q.weight", "blocks.0.attn.q_norm.weight", "blocks.2.attn.qkv.weight", "opt"])
    assert more in error_of(weights | {prefix + more: torch.zeros(2)}, kind)


def test_weights_of_another_format_are_refused(published):
    weights = {name: published(name)[1] for name in NETWORKS}
    assert "projectors.0.0.weight is unexpected in weights of sit" in error_of(weights["repa"], "sit")
    assert "names begin with denoiser." in error_of(weights["dit"], "groupdiff")
    assert "x_embedder.proj.weight is missing: not weights of dit" in error_of(weights["groupdiff dit"], "dit")
    assert "predicts 2 numbers a channel; weights of repa do not" in error_of(weights["dit"], "repa")
    ours = convert(weights["dit"], "dit").weights
    assert "weights of dit have a convolution" in error_of(ours, "dit")
    with pytest.raises(ValueError, match="not weights of dit, sit, repa, groupdiff or jit"):
        recognise({"conv1.weight": torch.zeros(3, 3)})


def test_positions_of_another_resolution_are_refused_and_rounded_ones_are_not(published):
    _, weights = published("dit")
    table = weights["pos_embed"]
    for rounded in (table.bfloat16(), table.half(), table * (1 + 1e-4)):
        assert convert(weights | {"pos_embed": rounded.float()}, "dit").config["data"]["side"] == SIDE
    squeezed = torch.nn.functional.interpolate(table.view(1, 3, 3, 24).movedim(3, 1), (2, 2), mode="bilinear")
    other = (table.flip(1), table + 0.1, table * torch.nan, table[:, :8], table[:, :0], squeezed.flatten(2).mT)
    for wrong in other:
        assert "of another resolution" in error_of(weights | {"pos_embed": wrong}, "dit")
    del weights["pos_embed"]
    assert "side" not in convert(weights, "dit").config["data"]


@pytest.mark.parametrize("name", ["dit", "dit of the noise alone"])
@pytest.mark.parametrize(("patch", "rows"), [(1, 0), (2, 0), (2, 1)])
def test_diffusers_class_predicts_the_same_once_its_frequencies_are_ours(name, patch, rows, published):
    from diffusers import DiTTransformer2DModel

    _, weights = published(name, patch=patch)
    ours, config = convert(weights, "dit")
    if rows:  # as a run of 0.1 has trained it
        ours[SAMPLE_TABLE], config["model"]["max_group_size"] = torch.randn(1, 24), 1
    network, path = load(ours, config), path_config(config["path"])
    model = DiT.Config(**config["model"], heads=3)
    settings, converted = to_diffusers(ours, model, path, SIDE)
    assert settings["num_embeds_ada_norm"] == CLASSES and settings["out_channels"] == network.out_channels
    transformer = DiTTransformer2DModel(**settings).eval()
    transformer.load_state_dict(converted)

    x, t, label, _ = inputs(16, "ddpm")
    t[:4] = torch.tensor([0.0, 1.0, 500.0, 999.0])
    expected = network(x, t, label, torch.zeros_like(label))
    their_label = label.where(label != NULL_LABEL, torch.tensor(CLASSES))
    with torch.no_grad():
        before = transformer(x, t, their_label).sample
        exec(EQUAL, {"transformer": transformer})
        after = transformer(x, t, their_label).sample
    assert (after - expected).abs().max() < 1e-5 * expected.abs().max()
    difference = (before - expected).abs().amax(dim=(1, 2, 3))
    assert difference[0] < 1e-5 * expected.abs().max()  # at t = 0 all frequencies are one
    assert difference[2:].max() > 1e-3

    back = {key: tensor.clone() for key, tensor in transformer.state_dict().items()}
    assert torch.equal(back["pos_embed.proj.weight"].flatten(1), ours["x_embedder.proj.weight"])
    for i in range(2):
        for kind in ("weight", "bias"):
            parts = [back[f"transformer_blocks.{i}.attn1.to_{part}.{kind}"] for part in "qkv"]
            assert torch.equal(torch.cat(parts), ours[f"blocks.{i}.attn.qkv.{kind}"])


@pytest.mark.parametrize(
    ("model", "path", "said"),
    [
        ({}, "linear", "path=linear: diffusers' DiT is for ddpm alone"),
        ({"max_group_size": 16}, "ddpm", "model.max_group_size=16: "),
        ({"mlp_ratio": 2.0}, "ddpm", "model.mlp_ratio=2.0: "),
        ({"time_scale": 1000.0}, "ddpm", "model.time_scale=1000.0: "),
        ({"backbone": "jit", "width": 24, "context_start": 1}, "ddpm", "model.backbone=jit: "),
        ({"depth": 3}, "ddpm", "blocks.2.attn.qkv.weight is missing"),
        ({"width": 12}, "ddpm", "x_embedder.proj.weight is (24, 12), must be (12, 12)"),
    ],
)
def test_what_diffusers_cannot_be_is_refused(model, path, said, published):
    ours, config = convert(published("dit")[1], "dit")
    wrong = model_config({**config["model"], "heads": 3, **model})
    with pytest.raises(ValueError) as caught:
        to_diffusers(ours, wrong, path_config({"name": path}), SIDE)
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)
