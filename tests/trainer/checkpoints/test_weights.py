"""A run starts with exactly the weights that it is given, whatever holds them; what does not fit or may do harm is
refused in one line."""

import argparse
import os
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.sets.registry import DataConfig, open_images
from models.backbones.sample_embedding import SLOTS, fold
from trainer.build import build_network, check_start, initial_network
from trainer.checkpoints import folder as checkpoint
from trainer.checkpoints.weights import export_weights, read_weights, start_from
from trainer.config.tree import load_config
from trainer.errors import RunError
from trainer.loop import train
from trainer.ranks import process_group

RANDOM = random.SystemRandom()
IMAGES = open_images(DataConfig())
NEWEST = "checkpoints/000000000064"


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny):
    """Two steps, a checkpoint after each."""
    run = tmp_path_factory.mktemp("weights") / "run"
    changes = ["engine=single", "train.images=64", "checkpoint.every=32", f"seed={RANDOM.randrange(2**31)}"]
    train(load_config(tiny, [f"run={run}", *changes]))
    return run


@pytest.fixture
def alone():
    with process_group():
        yield


@pytest.fixture
def config(tiny, tmp_path):
    return lambda *overrides: load_config(tiny, [f"run={tmp_path}/new", "engine=single", *overrides])


@pytest.fixture
def network(config):
    """The network of a new run."""
    return build_network(config(), IMAGES)


def drawn(network) -> dict[str, torch.Tensor]:
    """Random weights of its names and shapes."""
    torch.manual_seed(RANDOM.randrange(2**31))
    return {name: torch.randn(tensor.shape) for name, tensor in network.state_dict().items()}


def assert_equal(found, expected):
    assert list(found) == list(expected)
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32 and tensor.device.type == "cpu"
        assert torch.equal(tensor, expected[name]), name


def error_of(function, *arguments) -> str:
    with pytest.raises(RunError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_run_a_checkpoint_and_an_exported_file_give_a_new_run_the_same_weights(run, tensors, config, alone, tmp_path):
    stored = tensors(run / NEWEST)
    expected = {name: stored[f"ema.{name}"] for name in build_network(config(), IMAGES).state_dict()}
    assert any(not torch.equal(tensor, stored[f"model.{name}"]) for name, tensor in expected.items())
    assert export_weights(run, tmp_path / "deep/ema.safetensors") == run / NEWEST
    for source in (run, run / NEWEST, tmp_path / "deep/ema.safetensors"):
        started = config(f"init_from={source}")
        check_start(started, IMAGES)
        assert_equal(initial_network(started, IMAGES).state_dict(), expected)

    export_weights(run / NEWEST, tmp_path / "raw.safetensors", "model")
    for weights in (read_weights(tmp_path / "raw.safetensors"), read_weights(run, "model")):
        assert_equal({n: weights[n] for n in expected}, {n: stored[f"model.{n}"] for n in expected})
    before = tensors(run / "checkpoints/000000000032")
    earlier = initial_network(config(f"init_from={run}/checkpoints/000000000032"), IMAGES)
    assert_equal(earlier.state_dict(), {name: before[f"ema.{name}"] for name in expected})


def test_training_starts_from_them_and_goes_on_from_its_own(run, tensors, config, tmp_path):
    source = shutil.copytree(run, tmp_path / "source")
    still = [f"init_from={source}", "optim.lr=1e-30", "optim.warmup=0"]
    assert train(config(*still, "train.images=32")) == "finished"
    shutil.rmtree(source)
    longer = config(*still, "train.images=64")
    check_start(longer, IMAGES)
    assert train(longer) == "finished"
    start = {n.removeprefix("ema."): t for n, t in tensors(run / NEWEST).items() if n.startswith("ema.")}
    for position in ("000000000032", "000000000064"):
        made = tensors(tmp_path / "new/checkpoints" / position)
        for name, tensor in start.items():
            for part in ("model", "ema"):
                assert torch.allclose(made[f"{part}.{name}"], tensor, rtol=0, atol=1e-12), (position, part, name)


@pytest.mark.parametrize("suffix", [".pt", ".pth"])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize(
    "parts",
    [(), ("ema",), ("model",), ("state_dict",), ("model", "ema"), ("state_dict", "ema"), ("model", "model_ema")],
)
def test_torch_files(parts, prefix, suffix, network, tmp_path):
    """Flat, or with a dict as one of `parts`, of which the last is the one to take."""
    choices = [drawn(network) for _ in parts or [0]]
    named = [{prefix + name: tensor for name, tensor in weights.items()} for weights in choices]
    content = (
        {"steps": 7, "args": argparse.Namespace(lr=1e-4), **dict(zip(parts, named, strict=True))} if parts else named[0]
    )
    path = tmp_path / f"weights{suffix}"
    torch.save(content, path, _use_new_zipfile_serialization=RANDOM.random() < 0.5)
    assert_equal(read_weights(path), choices[-1])
    if parts == ("ema",):
        assert "no dict of tensors" in error_of(read_weights, path, "model")
    else:
        assert_equal(read_weights(path, "model"), choices[0])


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_become_float32(kind, network, tmp_path):
    weights = {name: tensor.to(kind) for name, tensor in drawn(network).items()}
    torch.save(weights, tmp_path / "weights.pt")
    save_file(weights, tmp_path / "weights.safetensors")
    start_from(network, read_weights(tmp_path / "weights.pt"), "there")
    expected = {name: tensor.float() for name, tensor in weights.items()}
    assert_equal(network.state_dict(), expected)
    read = read_weights(tmp_path / "weights.safetensors")
    assert_equal({name: read[name] for name in expected}, expected)


def test_of_the_sample_embedding_the_common_rows_are_taken_and_new_ones_are_as_in_a_new_network(
    config, alone, tmp_path
):
    for had, has in ((RANDOM.randint(2, 8), RANDOM.randint(9, 20)), (RANDOM.randint(9, 20), RANDOM.randint(2, 8))):
        weights = drawn(build_network(config(f"model.max_group_size={had}"), IMAGES))
        torch.save(weights, tmp_path / "weights.pt")
        started = config(f"model.max_group_size={has}", f"init_from={tmp_path}/weights.pt")
        check_start(started, IMAGES)
        table = torch.cat([weights[SLOTS][:has], build_network(started, IMAGES).state_dict()[SLOTS][had:]])
        assert len(table) == has
        assert_equal(initial_network(started, IMAGES).state_dict(), weights | {SLOTS: table})


def test_the_first_parameter_that_differs_is_named_and_nothing_is_copied(network):
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    names = list(before)
    for _ in range(20):
        weights = drawn(network)
        chosen = sorted(RANDOM.sample(range(len(names)), 2))
        first, second = (names[i] for i in chosen)
        shape = tuple(before[first].shape)
        weights[second] = torch.zeros(*before[second].shape, 1)
        if first != SLOTS and RANDOM.random() < 0.5:  # a plain network's have no sample embedding
            del weights[first]
            said = f"there: {first} is missing, the network's is {shape}: "
        else:
            weights[first] = torch.zeros(*shape[:-1], shape[-1] + 1)  # of the sample embedding too, its width
            said = f"there: {first} is {tuple(weights[first].shape)}, the network's is {shape}: "
        assert error_of(start_from, network, weights, "there").startswith(said)
    weights = {"more.bias": torch.zeros(3), **drawn(network)}
    assert error_of(start_from, network, weights, "there").startswith(
        "there: more.bias is (3,), the network's is missing: "
    )
    assert_equal(network.state_dict(), before)


def test_weights_of_another_model_are_found_out_without_reading_them(run, config, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "load", None)
    other = config(f"init_from={run}", "model.width=64")
    message = error_of(check_start, other, IMAGES)
    assert str(run) in message and "x_embedder.proj.weight is (32, 4), the network's is (64, 4)" in message
    deeper = config(f"init_from={run}", "model.depth=3")
    assert "blocks.2.attn.qkv.weight is missing" in error_of(check_start, deeper, IMAGES)
    check_start(config(f"init_from={run}"), IMAGES)
    check_start(config(), IMAGES)


def save_text(path):
    path.write_text("weights\n")


@pytest.mark.parametrize(
    ("name", "make", "said"),
    [
        ("nothing.pt", lambda path: None, "no such file or folder; give a run folder"),
        ("nothing", lambda path: None, "no such file or folder; give a run folder"),
        ("folder", lambda path: path.mkdir(), "no complete checkpoint in it; give a run folder"),
        ("folder.pt", lambda path: path.mkdir(), "no complete checkpoint in it; give a run folder"),
        ("weights.ckpt", save_text, "no kind of file that is known here; give a run folder"),
        ("weights.pt", save_text, "damaged"),
        ("weights.safetensors", save_text, "damaged"),
        ("weights.pth", lambda path: path.touch(), "damaged"),
        ("weights.pt", lambda path: torch.save([torch.zeros(2)], path), "no dict of tensors"),
        ("weights.pt", lambda path: torch.save({"a": torch.zeros(2), "steps": 3}, path), "no dict of tensors"),
        ("weights.pt", lambda path: torch.save({"ema": {"a": 1}}, path), "no dict of tensors"),
    ],
)
def test_what_holds_no_weights_is_named(name, make, said, config, alone, tmp_path):
    make(tmp_path / name)
    started = config(f"init_from={tmp_path / name}")
    for function in (check_start, initial_network):
        message = error_of(function, started, IMAGES)
        assert message.startswith(f"{tmp_path / name}: ") and said in message


class Code:
    """Unpickled, it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_file_that_would_execute_code_is_refused_and_does_not(tmp_path):
    content = {"model": {"a": torch.zeros(2)}, "extra": Code(tmp_path / "made")}
    torch.save(content, tmp_path / "new.pt")
    torch.save(content, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Code(tmp_path / "made"), protocol=2))
    for name in ("new", "old", "plain"):
        assert "refused, for posix.mkdir in it would execute code" in error_of(read_weights, tmp_path / f"{name}.pt")
    hidden = {"model": {"a": torch.zeros(2)}, "args": argparse.Namespace(lr=Code(tmp_path / "made"))}
    torch.save(hidden, tmp_path / "args.pt")
    assert "refused, for posix.mkdir in it would execute code" in error_of(read_weights, tmp_path / "args.pt")
    (tmp_path / "newer.pt").write_bytes(pickle.dumps(Code(tmp_path / "made"), protocol=4))
    error_of(read_weights, tmp_path / "newer.pt")
    assert not (tmp_path / "made").exists()
    torch.load(tmp_path / "new.pt", weights_only=False)
    assert (tmp_path / "made").exists(), "the test's own bait"


def test_files_cut_off_anywhere_are_refused(network, tmp_path):
    save_file(drawn(network), tmp_path / "a.safetensors")
    torch.save(drawn(network), tmp_path / "b.pt")
    torch.save(drawn(network), tmp_path / "c.pt", _use_new_zipfile_serialization=False)
    for path in list(tmp_path.iterdir()):
        whole = path.read_bytes()
        for size in {0, 1, 8, 100, len(whole) - 1, *(RANDOM.randrange(len(whole)) for _ in range(5))}:
            path.write_bytes(whole[:size])
            message = error_of(read_weights, path)
            assert message.startswith((f"{path}: damaged", f"{path}: refused")), (size, message)  # a name cut in two


def test_a_damaged_checkpoint_is_refused_before_it_is_read(run, config, tmp_path):
    damaged = shutil.copytree(run / NEWEST, tmp_path / "damaged")
    file = next(damaged.glob("*.distcp"))
    os.truncate(file, file.stat().st_size - 1)
    for values in (True, False):
        assert str(file) in error_of(read_weights, damaged, "ema", values)
    assert str(file) in error_of(export_weights, damaged, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_an_export_overwrites_nothing_and_leaves_nothing_half_written(run, tmp_path, monkeypatch):
    there = tmp_path / "there.safetensors"
    there.write_text("mine")
    assert "must be a new file" in error_of(export_weights, run, there) and there.read_text() == "mine"
    assert "ends in .safetensors" in error_of(export_weights, run, tmp_path / "weights.pt")
    assert "cannot be written" in error_of(export_weights, run, there / "below.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["there.safetensors"]
    out = tmp_path / "out.safetensors"
    monkeypatch.setattr("shutil.copymode", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    assert "disk full" in error_of(export_weights, run, out) and not out.exists()
    monkeypatch.undo()
    export_weights(run, out)
    assert {p.name for p in tmp_path.iterdir()} == {there.name, out.name} and load_file(out)
    assert out.stat().st_mode == (run / NEWEST / "config.yaml").stat().st_mode


PLAIN = ["groups.variant=none", "groups.size=1", "groups.share=0", "model.max_group_size=null"]


@pytest.mark.parametrize("rows", [None, 1])
def test_group_diffusion_starts_at_a_plain_network(rows, config, alone, tmp_path):
    """Without a sample embedding, as all are now, or with the one row that older ones have."""
    plain = config(*PLAIN, *([f"model.max_group_size={rows}"] if rows else []))
    weights = drawn(build_network(plain, IMAGES))
    assert (SLOTS in weights) == bool(rows)
    torch.save(weights, tmp_path / "weights.pt")
    started = config("model.max_group_size=9", f"init_from={tmp_path}/weights.pt")
    check_start(started, IMAGES)
    state = initial_network(started, IMAGES).state_dict()
    table = weights.get(SLOTS, torch.zeros(1, 32)).repeat(9, 1)
    assert_equal(state, {name: table if name == SLOTS else weights[name] for name in state})


def test_a_plain_network_takes_a_single_row_into_its_classes_and_refuses_several(config, alone, tmp_path):
    started = config(*PLAIN, f"init_from={tmp_path}/weights.pt")
    weights = drawn(build_network(config(*PLAIN, "model.max_group_size=1"), IMAGES))
    torch.save(weights, tmp_path / "weights.pt")
    check_start(started, IMAGES)
    state = initial_network(started, IMAGES).state_dict()
    assert SLOTS not in state
    assert_equal(state, fold(weights))

    torch.save(drawn(build_network(config(*PLAIN, "model.max_group_size=16"), IMAGES)), tmp_path / "weights.pt")
    for function in (check_start, initial_network):
        said = error_of(function, started, IMAGES)
        assert f"{SLOTS} is (16, 32), the network's is missing" in said and said.endswith("set model.max_group_size=16")


def test_the_continued_recipe_takes_the_weights_of_the_plain_one():
    class Latents:
        shape, num_classes = (4, 32, 32), 1000

    plain, continued = (load_config(f"configs/imagenet256/sit/sit-xl-2{x}.yaml") for x in ("", "-light-4-continued"))
    assert continued.init_from == plain.run
    assert (
        continued.model == plain.model.model_copy(update={"max_group_size": 16})
        and continued.path == plain.path
        and continued.data.side == plain.data.side
    )
    assert continued.groups == load_config("configs/imagenet256/sit/sit-xl-2-light-4.yaml").groups
    with torch.device("meta"):
        a, b = (build_network(config, Latents()) for config in (plain, continued))
    start_from(b, a.state_dict(), plain.run)
