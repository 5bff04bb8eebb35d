"""How to add an optimizer, or a rule that treats some parameters differently: a function, and one line in a dict."""

import pytest
import torch

from tests.trainer.go_on import stored
from trainer.checkpoints.weights import WeightSource, find_checkpoint
from trainer.config.tree import load_config
from trainer.engines.optimizer import OPTIMIZERS, RULES
from trainer.errors import RunError
from trainer.loop import train
from trainer.sampling.samples import make_samples


def no_biases(name, parameter):
    """Decay matrices and tables only: settings that a group has in place of the optimizer's own."""
    return {} if parameter.ndim > 1 else {"weight_decay": 0.0}


def sgd(groups, optim):
    """Stochastic gradient descent with momentum. All of its state is there from the start, for checkpoints to fill."""
    optimizer = torch.optim.SGD(groups, lr=optim.lr, momentum=optim.betas[0], weight_decay=optim.weight_decay)
    for group in groups:
        for parameter in group["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


@pytest.fixture(autouse=True)
def added(monkeypatch):
    monkeypatch.setitem(RULES, "no_biases", no_biases)
    monkeypatch.setitem(OPTIMIZERS, "sgd", sgd)


@pytest.fixture
def run(tmp_path):
    """Train (or resume) a run until so many images; all tensors of its checkpoint."""

    def to(images, name, *overrides):
        options = [f"run={tmp_path}/{name}", "optim.warmup=0", "optim.weight_decay=0.5", f"train.images={images}"]
        config = load_config("tests/trainer/tiny.yaml", [*options, *overrides])
        train(config)
        return stored(find_checkpoint(tmp_path / name))

    return to


def test_a_rule_of_ones_own_says_what_decays(run, tmp_path):
    """Biases start at 0, so that the rule makes no difference before the second step, and then to biases alone."""
    options = "engine=single", "checkpoint.every=32", "optim.weight_decay=5"
    found, everything = run(64, "rule", *options, "optim.decay=no_biases"), run(64, "everything", *options)
    first = stored(tmp_path / "rule/checkpoints/000000000032")
    assert torch.equal(found["model.blocks.0.attn.qkv.weight"], everything["model.blocks.0.attn.qkv.weight"])
    differing = [name for name in found if name.startswith("model.") and not torch.equal(found[name], everything[name])]
    assert differing and all(name.endswith("bias") for name in differing)
    for name in differing:
        assert torch.allclose(everything[name], found[name] - 1e-3 * 5 * first[name], rtol=0, atol=1e-7), name


@pytest.mark.parametrize("engine", ["single", "ddp", "fsdp"])
def test_an_optimizer_of_ones_own_trains_saves_resumes_and_samples(engine, run, tmp_path):
    options = f"engine={engine}", "optim.name=sgd", "optim.decay=no_biases", "optim.lr=0.1"
    whole = run(128, "whole", *options)
    run(64, "stopped", *options)
    resumed = run(128, "stopped", *options)
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    moments = {name.rpartition(".")[2] for name in whole if name.startswith("optimizer.")}
    assert moments == {"momentum_buffer"}
    checkpoint = find_checkpoint(tmp_path / "whole")
    pixels, _, _ = make_samples(WeightSource(checkpoint), load_config(checkpoint / "config.yaml"))
    assert pixels.shape[:2] == (10, 2)  # groups, images of each


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("optim.decay=some", r"optim.decay=some: .* 'all' or 'matrices' or 'no_biases'"),
        ("optim.name=adam", r"optim.name=adam: .* 'adamw' or 'sgd'"),
        ("optim.name=sgd engine=deepspeed", r"optim.name=sgd: not with engine=deepspeed; set adamw"),
    ],
)
def test_what_is_not_there_or_does_not_fit_is_refused_in_one_line(override, line):
    with pytest.raises(RunError, match=line):
        load_config("tests/trainer/tiny.yaml", override.split())


def test_a_run_keeps_its_optimizer_and_its_rule(run):
    run(32, "run", "engine=single")
    for field, other, own in (("optim.name", "sgd", "adamw"), ("optim.decay", "no_biases", "all")):
        with pytest.raises(RunError, match=f"{field}={other}: the run in .* has {field}={own}; set it back"):
            run(64, "run", "engine=single", f"{field}={other}")
