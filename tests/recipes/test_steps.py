"""Three whole steps of each recipe, in float64, are those of the published code: loss, weights and averages agree to a
millionth of what the steps changed.

Float64, because AdamW divides a gradient by its own size: where terms of a sum cancel, a weight moves by lr times what
rounding left of the sum, and keys' biases, whose gradient is 0 but for rounding, move anywhere. What differs in fp32 is
3e-5 to 1e-3 of the update (up to 0.2 for DiT, in the tails of the first step's likelihood), and 0.3 to 1 of what three
steps change in an average, which is less than fp32 resolves: it says nothing about the recipe. In float64 it is 1e-11
and 1e-8. Batches, network, objective and engine are those of a run; test_runs.py has runs in fp32.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.func import functional_call

from data.batches.plan import GroupsConfig
from data.batches.steps import Steps
from data.sets.arrays import ArrayImages
from models.backbones.registry import make_network, model_config
from models.objectives.objective import make_objective
from models.objectives.registry import MAIN
from models.objectives.term import TermConfig
from models.paths.registry import make_path, path_config
from tests.published import Denoiser
from tests.published_jit import published_jit
from tests.recipes.reference import (
    Images,
    Recipe,
    accumulate,
    begin,
    dit_loss,
    gradient,
    jit_loss,
    move,
    release_decays,
    sit_loss,
)
from trainer.engines.build import build_engine
from trainer.engines.config import EngineConfig, OptimConfig
from trainer.engines.schedules import lr_at
from trainer.ranks import process_group

CHANNELS, SIDE, CLASSES, BATCH, STEPS = 3, 6, 5, 16, 3
WIDTH = {"depth": 2, "width": 24, "heads": 3}
JIT = {"backbone": "jit", "bottleneck": 10, "context_tokens": 4, "context_start": 1}
LIGHT = {"variant": "light", "size": 4, "share": 0.5, "query": "random", "mixing": "within_step", "splits": 1}
FULL = {"variant": "full", "size": 4, "query": "random", "drop": 0.4, "spread": 0.1}
PLAIN = {"variant": "none", "size": 1, "drop": 0.4}


def denoiser(sigma=False, slots=0):
    """The published DiT: (its weights by name, its prediction as a function of them)."""

    def build(network, random_weights, seed):
        theirs = Denoiser(sigma=sigma, slots=slots, channels=CHANNELS, side=SIDE, classes=CLASSES)
        positions = theirs.pos_embed.data.clone()
        random_weights(theirs, seed).pos_embed.data.copy_(positions)
        theirs.double()
        trained = {name: weight for name, weight in theirs.named_parameters() if weight.requires_grad}
        return trained, lambda weights, *inputs: functional_call(theirs, weights, inputs)

    return build


def jit(network, random_weights, seed):
    """The published JiT, likewise."""
    weights = dict(random_weights(network, seed).named_parameters())
    for name in (name for name in weights if "norm" in name):
        weights[name].data += 1
    return weights, lambda weights, *inputs: published_jit(weights, network.config, *inputs)


SIT = Recipe()
GROUPDIFF = Recipe(betas=(0.9, 0.95), decay=0.01, decays=release_decays, clip=2.0)  # its 3 would clip nothing here
RECIPES = {  # name -> (published network, model, path, its loss, groups, optimizer)
    "dit": (denoiser(sigma=True), WIDTH, "ddpm", dit_loss, PLAIN, SIT),
    "sit": (denoiser(), WIDTH, "linear", sit_loss, PLAIN, SIT),
    "sit clipped, as in repa": (denoiser(), WIDTH, "linear", sit_loss, PLAIN, replace(SIT, clip=1.0)),
    "jit": (jit, WIDTH | JIT, "jit", jit_loss, PLAIN, Recipe(5e-5, (0.9, 0.95), averages=(0.9999, 0.9996), warmup=32)),
    "groupdiff-light dit": (denoiser(sigma=True, slots=8), WIDTH, "ddpm", dit_loss, LIGHT, GROUPDIFF),
    "groupdiff-light sit": (denoiser(slots=8), WIDTH, "linear", sit_loss, LIGHT, GROUPDIFF),
    "groupdiff-full dit": (denoiser(sigma=True, slots=8), WIDTH, "ddpm", dit_loss, FULL, GROUPDIFF),
    "groupdiff-full sit": (denoiser(slots=8), WIDTH, "linear", sit_loss, FULL, GROUPDIFF),
}


def make_batches(groups, slots, seed):
    """The micro-batches of each step, in float64, of random images; one at DDPM's step 0."""
    rng = np.random.default_rng(seed)
    shape = (64, CHANNELS, SIDE, SIDE)
    x = rng.normal(size=shape).astype(np.float32)
    images = ArrayImages(x, rng.integers(CLASSES, size=64), np.empty((64, 1)), CLASSES)
    config = GroupsConfig.model_validate(groups)
    made = list(images.batches(Steps(config, BATCH, slots, seed, 0, STEPS), lambda *plan: None))
    for micro in (micro for step in made for micro in step):
        micro.u[0] = 0.0004
    return [
        [replace(each, x=each.x.double(), noise=each.noise.double(), u=each.u.double()) for each in step]
        for step in made
    ]


def plain_numbers(batch):
    label = batch.label.where(batch.conditional, torch.tensor(CLASSES))
    return Images(batch.x, batch.noise, batch.u, label, batch.slot, batch.group_size)


def train(network, path, recipe, batches):
    """Our steps of a network, as the loop takes them: losses, gradient norms, the engine's state."""
    optim = OptimConfig(
        lr=recipe.lr,
        betas=recipe.betas,
        weight_decay=recipe.decay,
        clip=recipe.clip,
        decay="matrices" if recipe.decays is release_decays else "all",
        ema=recipe.averages,
        warmup=recipe.warmup,
    )
    rows = []
    with process_group() as ranks:
        objective = make_objective({MAIN: TermConfig()}, network, {}, 0)
        engine = build_engine(EngineConfig(engine="single"), optim, network, ranks)
        for step, micro_batches in enumerate(batches):
            losses = []
            for i, micro in enumerate(micro_batches):
                with engine.accumulating(last=i == len(micro_batches) - 1):
                    loss = objective(engine, path, micro)["loss"].sum() / BATCH
                    engine.backward(loss)
                losses.append(loss.item())
            rows.append((sum(losses), float(engine.step(lr_at(optim, (step + 1) * BATCH, STEPS * BATCH)))))
        return rows, engine.state()


def distance(found, expected, start):
    """The largest distance of any weight, as a share of the largest change in its tensor."""
    assert found.keys() == expected.keys()
    shares = {}
    for name, tensor in expected.items():
        change = (tensor - start[name]).abs().max()
        assert change > 0, name
        shares[name] = ((found[name].view(tensor.shape) - tensor).abs().max() / change).item()
    return max(shares.values())


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", RECIPES)
def test_three_steps_are_those_of_the_published_code(name, seed, random_weights):
    build, model, path_name, loss, groups, recipe = RECIPES[name]
    slots = 0 if groups is PLAIN else 8
    path = make_path(path_config(path_name))
    model = model_config({**model, "max_group_size": slots})
    network = make_network(model, CHANNELS, SIDE, CLASSES, path.config.predictions * CHANNELS)
    weights, predict = build(network, random_weights, seed)
    shapes = {key: weight.shape for key, weight in network.state_dict().items()}
    network.load_state_dict({key: weight.view(shapes[key]) for key, weight in weights.items()})
    batches = make_batches(groups, slots, seed)
    assert len({micro.in_groups for step in batches for micro in step}) == (2 if groups is LIGHT else 1)
    assert len({bool(kept) for step in batches for micro in step for kept in micro.conditional}) == 2

    state, expected = begin(weights, recipe), []
    start = state.weights.copy()
    for step, micro_batches in enumerate(batches):
        lr = recipe.lr * min(1.0, (step + 1) * BATCH / recipe.warmup) if recipe.warmup else recipe.lr
        value, grads = gradient(state.weights, predict, loss, [plain_numbers(micro) for micro in micro_batches])
        expected.append((value, accumulate(state, recipe, grads)))
        move(state, recipe, lr)

    rows, found = train(network.double(), path, recipe, batches)
    for row, other in zip(rows, expected, strict=True):
        assert row == pytest.approx(other, rel=1e-9)
    assert recipe.clip is None or max(norm for _, norm in rows) > recipe.clip
    assert distance(found["model"], state.weights, start) < 1e-6
    averages = [found[key] for key in found if key.startswith("ema")]
    for average, expected_average in zip(averages, state.averages, strict=True):
        assert distance(average, expected_average, start) < 1e-6
