"""Which parameters decay by the rule `matrices`, and that they are updated as AdamW's formula says (of all engines:
test_heads.py)."""

import pytest
import torch
from torch import nn

from data.sets.form import ImageForm
from tests.trainer.engines.with_heads import STEPS, Training
from tests.trainer.go_on import flat
from trainer.build import build_network
from trainer.checkpoints import folder as checkpoint
from trainer.config.tree import load_config
from trainer.engines.config import OptimConfig
from trainer.engines.optimizer import RULES, matrices_decay, parameter_groups
from trainer.engines.schedules import lr_at
from trainer.errors import RunError
from trainer.ranks import process_group

IMAGES = ImageForm((1, 8, 8), 10, None, "images")
JIT = ["model.backbone=jit", "model.context_start=1", "model.context_tokens=4"]
RULE = ["engine=single", "optim.decay=matrices", "optim.weight_decay=5", "optim.ema=[0.9,0.5]"]
IN_BLOCKS = {
    "dit": {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1"},
    "jit": {"attn.qkv", "attn.proj", "mlp.w12", "mlp.w3", "adaLN_modulation.1"},
}


def decaying(network):
    return {name for name, weight in network.named_parameters() if not matrices_decay(name, weight)}


@pytest.mark.parametrize("backbone", ["dit", "jit"])
def test_matrices_of_blocks_and_of_the_last_layer_decay_and_nothing_else(backbone, tiny):
    """Not embeddings of patches, times, classes and slots, norms, biases, nor the places of JiT's class tokens."""
    network = build_network(load_config(tiny, JIT if backbone == "jit" else []), IMAGES)
    blocks = {f"blocks.{i}.{name}.weight" for i in range(2) for name in IN_BLOCKS[backbone]}
    last = {f"final_layer.{name}.weight" for name in ("linear", "adaLN_modulation.1")}
    assert decaying(network) == blocks | last


def test_for_dit_it_is_the_rule_of_the_release(tiny):
    """Its words, of which our shorter one makes two."""
    words = ("ln", "bias", "embedding", "norm", "gamma", "embed", "token")
    network = build_network(load_config(tiny), IMAGES)
    expected = {n for n, p in network.named_parameters() if p.ndim >= 2 and not any(word in n for word in words)}
    assert decaying(network) == expected != set()


def test_the_name_of_a_head_does_not_matter_but_those_of_its_parameters_do():
    for head in ("alignment", "token_norm", "embedding", "bias"):
        assert matrices_decay(f"heads.{head}.0.weight", torch.zeros(2, 2)) == {}
        assert matrices_decay(f"heads.{head}.0.bias", torch.zeros(2)) == {"weight_decay": 0.0}
        assert matrices_decay(f"heads.{head}.class_token", torch.zeros(2, 2)) == {"weight_decay": 0.0}


def test_groups_hold_each_parameter_once_in_the_order_of_the_network(tiny):
    network = build_network(load_config(tiny), IMAGES)
    groups = parameter_groups(dict(network.named_parameters()), OptimConfig.model_validate({"decay": "matrices"}))
    assert [group.get("weight_decay") for group in groups] == [0.0, None]
    found = [id(weight) for group in groups for weight in group["params"]]
    assert sorted(found) == sorted(map(id, network.parameters()))
    order = {id(weight): i for i, weight in enumerate(network.parameters())}
    for group in groups:
        assert [order[id(w)] for w in group["params"]] == sorted(order[id(w)] for w in group["params"])


def test_a_rule_by_which_nothing_decays_is_one_line(tiny, monkeypatch):
    monkeypatch.setitem(RULES, "none", lambda name, weight: {"weight_decay": 0.0})
    only_biases = {name: weight for name, weight in nn.Linear(2, 2).named_parameters() if name == "bias"}
    for rule, weights in (("none", dict(nn.Linear(2, 2).named_parameters())), ("matrices", only_biases)):
        line = rf"^optim.decay={rule}: no parameter decays by this rule; set another, or optim.weight_decay=0$"
        with pytest.raises(RunError, match=line):
            parameter_groups(weights, OptimConfig.model_validate({"decay": rule}))
        assert parameter_groups(weights, OptimConfig.model_validate({"decay": rule, "weight_decay": 0}))
    with process_group() as ranks, pytest.raises(RunError, match=r"^optim.decay=none"):
        Training(load_config(tiny, ["engine=single", "optim.decay=none"]), ranks)


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory):
    """What a checkpoint should hold after STEPS steps, in float64, from the gradients that one process computes:
    Loshchilov and Hutter 2019, algorithm 2, with its gradients clipped before."""
    folder = tmp_path_factory.mktemp("by-hand")
    config = load_config("tests/trainer/tiny.yaml", [*RULE, "optim.clip=0.5", f"run={folder}"])
    gradients = []
    with process_group() as ranks:
        run = Training(config, ranks)
        trained = run.engine.trained
        weights = {name: weight.detach().double().clone() for name, weight in trained.items()}
        taken = run.engine.step

        def step(lr):
            gradients.append({name: weight.grad.double().clone() for name, weight in trained.items()})
            return taken(lr)

        run.engine.step = step
        run.steps(0)
        found = flat(run.engine.state())
    return config, weights, gradients, {name: tensor.clone() for name, tensor in found.items()}


def test_one_process_updates_as_the_formula_says(by_hand):
    config, weights, gradients, found = by_hand
    optim, batch = config.optim, config.train.global_batch
    first, second = optim.betas
    m = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    v, averages = dict(m), [dict(weights) for _ in optim.ema]
    for t, gradient in enumerate(gradients, start=1):
        norm = torch.cat([g.flatten() for g in gradient.values()]).norm()
        assert norm > optim.clip, "the clipping acts"
        lr = lr_at(optim, batch * t, config.train.images)
        for name, g in gradient.items():
            g = g * optim.clip / norm
            m[name] = first * m[name] + (1 - first) * g
            v[name] = second * v[name] + (1 - second) * g**2
            decay = optim.weight_decay if not matrices_decay(name, g) else 0
            update = (m[name] / (1 - first**t)) / ((v[name] / (1 - second**t)).sqrt() + 1e-8)
            weights = weights | {name: weights[name] - lr * (update + decay * weights[name])}
        for average, share in zip(averages, optim.ema, strict=True):
            average.update({name: share * average[name] + (1 - share) * weights[name] for name in weights})
    assert len(gradients) == STEPS
    for name, weight in weights.items():
        model = name if name.startswith("heads.") else f"model.{name}"
        pairs = [(model, weight), (f"optimizer.state.{name}.exp_avg", m[name])]
        pairs += [(f"optimizer.state.{name}.exp_avg_sq", v[name])]
        if not name.startswith("heads."):
            pairs += [(f"ema.{name}", averages[0][name]), (f"ema_0.5.{name}", averages[1][name])]
        for key, expected in pairs:
            assert (found[key] - expected).abs().max() <= 1e-6 * expected.abs().max(), key


def test_what_was_saved_without_groups_goes_on_with_them(tiny, tmp_path):
    """State is stored by the names of parameters: a checkpoint of decay=all, or of an older version, fits any rule."""
    options = ["engine=single", "optim.weight_decay=5", f"run={tmp_path}"]
    with process_group() as ranks:
        before = Training(load_config(tiny, options), ranks)
        before.steps(0)
        before.save(tmp_path)
        after = Training(load_config(tiny, [*options, "optim.decay=matrices"]), ranks)
        state = after.engine.state()
        checkpoint.load(checkpoint.find(tmp_path)[0][-1], state)
        after.engine.load_state(state, STEPS)
        found, expected = flat(after.engine.state()), flat(before.engine.state())
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        decayed = {name: weight.detach().clone() for name, weight in before.engine.weights.items()}
        assert before.steps(STEPS, 1) == after.steps(STEPS, 1), "the same gradient"
        for name, weight in before.engine.weights.items():
            same = torch.equal(weight, after.engine.weights[name])
            assert same == (not matrices_decay(name, weight) or not decayed[name].any()), name
