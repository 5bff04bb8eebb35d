"""Weights travel as one file: exported by the tool, started from by a new run; wrong calls are one line."""

import runpy
import sys

import pytest
import torch
import yaml
from safetensors import safe_open

from trainer.checkpoints.weights import read_weights
from trainer.config.tree import load_config, parse_config
from trainer.loop import train

CONFIG = "configs/digits.yaml"
SMALL = ["engine=single", "model.depth=1", "model.width=32", "train.images=128", "train.sample_every=0"]
SMALL += ["optim.ema=[0.99,0.9]"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = tmp_path_factory.mktemp("export") / "run"
    train(load_config(CONFIG, [f"run={run}", *SMALL]))
    return run


@pytest.fixture
def error(monkeypatch):
    """What a tool says when it fails; in this process, which has all imported."""

    def of(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"tools/{name}.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(f"tools/{name}.py", run_name="__main__")
        assert str(caught.value.code).startswith("error: ") and "\n" not in caught.value.code
        return caught.value.code

    return of


@pytest.mark.parametrize(
    ("options", "called", "part"),
    [
        ([], "EMA", "ema"),
        (["--raw"], "raw", "model"),
        (["--weights", "model"], "raw", "model"),
        (["--weights", "ema_0.9"], "EMA_0.9", "ema_0.9"),
    ],
)
def test_the_file_says_what_it_holds(options, called, part, run, tool, tmp_path):
    out, folder = tmp_path / "weights.safetensors", run / "checkpoints/000000000128"
    done = tool("export_weights", run, out, *options)
    assert done.out == f"{out}: {called} weights of {folder}\n" and done.err == ""
    with safe_open(out, "pt") as file:
        metadata, weights = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert (metadata["position"], metadata["weights"]) == ("128", part)
    assert metadata["config"] == (folder / "config.yaml").read_text()
    assert parse_config(yaml.safe_load(metadata["config"])) == load_config(CONFIG, [f"run={run}", *SMALL])
    expected = read_weights(run, part)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights.items())


def test_wrong_calls_are_one_line(run, error, tmp_path):
    out = tmp_path / "out.safetensors"
    assert "no complete checkpoint" in error("export_weights", tmp_path, out)
    assert "no complete checkpoint" in error("export_weights", tmp_path / "nothing", out)
    assert "ends in .safetensors" in error("export_weights", run, tmp_path / "out.pt")
    assert "give model or ema or ema_0.9, or a file" in error("export_weights", run, out, "--weights", "ema_0.99")
    assert "--weights ema_0.8: no such file, nor part of" in error("sample", run, "--weights", "ema_0.8")
    assert "--raw: not with --weights ema_0.9" in error("sample", run, "--weights", "ema_0.9", "--raw")
    assert not list(tmp_path.iterdir())
    out.write_text("mine")
    assert "must be a new file" in error("export_weights", run, out)
    assert out.read_text() == "mine"


def test_a_run_that_cannot_start_from_its_weights_is_not_submitted(run, error, tmp_path):
    new = ["--cluster", "local", CONFIG, *SMALL, f"run={tmp_path}/new"]
    assert "no such file or folder" in error("submit", *new, f"init_from={tmp_path}/weights.pt")
    message = error("submit", *new, "model.width=64", f"init_from={run}")
    assert "x_embedder.proj.weight is (32, 4), the network's is (64, 4)" in message
    message = error("submit", *new, f"--sweep=init_from={run},{tmp_path}/weights.pt")
    assert f"{tmp_path}/weights.pt: no such file or folder" in message
    assert not list(tmp_path.iterdir())
