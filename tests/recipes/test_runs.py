"""Runs in fp32, on one rank or two, take the reference's steps: what a checkpoint of each step holds follows from the
one before it.

The loss, the gradient's norm and the moments are those of a float64 gradient at the same weights, up to the rounding of
sums in fp32. Weights and averages follow from these moments to the rounding of the last operations on them, so that
nothing is left for small gradients to blow up, as three steps at a time would.
"""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch.func import functional_call

from data.batches.steps import Steps
from tests.published import Denoiser
from tests.recipes.reference import Images, Recipe, State, accumulate, begin, gradient, move, release_decays, sit_loss
from tests.trainer.forked import TINY, Forked, train_tiny
from tests.trainer.go_on import stored
from trainer.build import build_network, open_data
from trainer.config.tree import load_config

BATCH, STEPS = 32, 3
RECIPE = Recipe(lr=1e-3, betas=(0.9, 0.95), decay=1.0, decays=release_decays, clip=1.0, averages=(0.9,), warmup=320)
CONFIG = [
    "optim={lr: 1e-3, betas: [0.9, 0.95], weight_decay: 1.0, decay: matrices, clip: 1.0, ema: 0.9, warmup: 320}",
    f"train.images={STEPS * BATCH}",
    f"checkpoint.every={BATCH}",
]
RUNS = {  # engine -> ranks, overrides
    "single": (1, []),
    "ddp": (2, []),
    "fsdp": (2, ["train.micro_batch=4"]),
    "deepspeed": (2, ["zero=2"]),
}
ROUNDING = 2.0**-24  # of fp32


@pytest.fixture(scope="module")
def started(tmp_path_factory, random_weights):
    """A run of each engine from the same random weights, and these."""
    folder = tmp_path_factory.mktemp("recipes")
    config = load_config(TINY, CONFIG)
    network = random_weights(build_network(config, open_data(config)), 0)
    save_file(network.state_dict(), folder / "start.safetensors")
    for world in (1, 2):
        names = [name for name, (ranks, _) in RUNS.items() if ranks == world]
        own = ([f"engine={name}", f"run={folder}/{name}", *RUNS[name][1]] for name in names)
        runs = ([*CONFIG, f"init_from={folder}/start.safetensors", *overrides] for overrides in own)
        Forked(folder).run_many(world, train_tiny, *runs)
    return folder, config, {name: weight.detach() for name, weight in network.named_parameters()}


def steps(config):
    """The plain numbers of each step's images, whatever the number of ranks."""
    images = open_data(config)
    asked = Steps(config.groups, BATCH, config.model.max_group_size, config.seed, 0, STEPS)
    for micro_batches in images.batches(asked, lambda *plan: None):
        label = [micro.label.where(micro.conditional, torch.tensor(10)) for micro in micro_batches]
        yield [
            Images(micro.x.double(), micro.noise.double(), micro.u.double(), y, micro.slot, micro.group_size)
            for micro, y in zip(micro_batches, label, strict=True)
        ]


def stored_state(run, step):
    """The state in the checkpoint after a step, in float64."""
    checkpoint = stored(run / f"checkpoints/{step * BATCH:012}")

    def part(prefix, suffix=""):
        chosen = (name for name in checkpoint if name.startswith(prefix) and name.endswith(suffix))
        return {name.removeprefix(prefix).removesuffix(suffix): checkpoint[name].double() for name in chosen}

    moments = (part("optimizer.state.", f".{name}") for name in ("exp_avg", "exp_avg_sq"))
    return State(part("model."), [part("ema.")], *moments, steps=step)


def near(found, expected, lr):
    """Up to three roundings of a weight (what decay leaves of 1, times it, less the step) and some of a step."""
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert ((found[key] - tensor).abs() < ROUNDING * (3 * tensor.abs() + 8 * lr)).all(), key


@pytest.mark.parametrize("name", RUNS)
def test_each_step_of_a_run_is_that_of_the_published_code(name, started):
    folder, config, weights = started
    theirs = Denoiser(slots=8, width=32, heads=2, hidden=128, classes=10, channels=1, side=8).double()
    shapes = {key: weight.shape for key, weight in theirs.named_parameters()}

    def predict(weights, *inputs):
        return functional_call(theirs, {key: weight.view(shapes[key]) for key, weight in weights.items()}, inputs)

    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    state = begin(weights, RECIPE)
    for step, images in enumerate(steps(config), start=1):
        loss, grads = gradient(state.weights, predict, sit_loss, images)
        norm = accumulate(state, RECIPE, grads)
        row, found = rows[step - 1], stored_state(folder / name, step)
        lr = RECIPE.lr * step * BATCH / RECIPE.warmup
        assert (row["loss"], row["grad_norm"], row["lr"]) == pytest.approx((loss, norm, lr), rel=1e-6)
        for moments, expected in ((found.first, state.first), (found.second, state.second)):
            assert moments.keys() == expected.keys()
            for key, tensor in expected.items():  # a gradient is a sum of some hundred products
                assert (moments[key] - tensor).norm() < 32 * ROUNDING * tensor.norm(), (step, key)

        state.first, state.second = found.first, found.second
        move(state, RECIPE, lr)
        near(found.weights, state.weights, lr)
        near(found.averages[0], state.averages[0], lr)
        state = found
