"""How far bf16 is from fp32 in a network as deep as DiT-XL: with tokens in fp32, as the trainer has them, and in bf16,
by a hook of this file."""

import statistics
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import Figures, Targets
from benchmarks.network import dit, wait
from data.batches.batch import Batch
from data.batches.steps import Steps
from data.sets.form import form_of
from data.sets.registry import Split, open_images
from models.backbones.base import Backbone
from models.objectives.denoising import denoising_loss
from models.paths.registry import make_path
from trainer.build import build_network
from trainer.config.tree import Config, load_config
from trainer.engines.base import Engine
from trainer.engines.build import build_engine
from trainer.engines.schedules import lr_at
from trainer.ranks import Ranks, process_group

STEPS, BATCH, LOOKS, ROUNDS = 2000, 16, 16, 7
DEEP = ["model.depth=28", "model.width=64", "engine=single", f"train.global_batch={BATCH}"]


class Law(NamedTuple):
    """How a network computes: its precision, the type of its tokens, and a factor on its first weights."""

    precision: str = "fp32"
    tokens: torch.dtype = torch.float32
    factor: float = 1.0


class Look(NamedTuple):
    """What a network makes of held-out images."""

    prediction: Tensor
    gradient: Tensor
    loss: float


FP32, HALF = Law(), {"fp32_tokens": Law("bf16"), "bf16_tokens": Law("bf16", torch.bfloat16)}
# a run whose first weights differ in their last digit tells how far two runs go apart by themselves
OTHERS = {"fp32_again": Law(factor=1 + 2**-23), **HALF}


def measure() -> tuple[Figures, Targets]:
    """28 blocks of width 64 on digits, 2,000 steps by each law; what a step of DiT-S/2 keeps and takes."""
    with process_group() as ranks:
        return {**distances(ranks), **saved_bytes(), **step_seconds()}, {}


def distances(ranks: Ranks) -> Figures:
    """Return relative distances from the run in fp32: `weights_*` of averages, over how far training moved them, and
    `prediction_*` of theirs; `loss_*` is over the loss in fp32. `rounded_*`: with the weights of the run in fp32."""
    start, exact = trained(ranks, FP32, 0), trained(ranks, FP32, STEPS)
    seen = look(ranks, FP32, exact)
    figures: Figures = {"loss_fp32": seen.loss}
    for name, law in OTHERS.items():
        weights = trained(ranks, law, STEPS)
        its = look(ranks, law, weights)
        figures[f"weights_{name}"] = _apart(weights, exact) / _apart(exact, start)
        figures[f"prediction_{name}"] = _relative(its.prediction, seen.prediction)
        figures[f"loss_{name}"] = its.loss / seen.loss
    for name, law in HALF.items():
        its = look(ranks, law, exact)
        figures[f"rounded_prediction_{name}"] = _relative(its.prediction, seen.prediction)
        figures[f"rounded_gradient_{name}"] = _relative(its.gradient, seen.gradient)
    return figures


def trained(ranks: Ranks, law: Law, steps: int) -> dict[str, Tensor]:
    """Return the averaged weights of a run after so many steps."""
    config, engine = _engine(ranks, law)
    path = make_path(config.path)
    for weight in engine.weights.values():
        weight.data *= law.factor
    for i, micro_batches in enumerate(_batches(config, steps)):
        for batch in micro_batches:
            engine.backward(denoising_loss(engine, path, batch.to(ranks.device)).sum() / BATCH)
        engine.step(lr_at(config.optim, (i + 1) * BATCH, STEPS * BATCH))
    return engine.averages["ema"].average


def look(ranks: Ranks, law: Law, weights: dict[str, Tensor]) -> Look:
    """Return what a network with these weights makes of held-out images."""
    config, engine = _engine(ranks, law)
    predictions, total = [], 0.0
    engine.network.register_forward_hook(lambda network, inputs, output: predictions.append(output.detach()))
    for name, weight in engine.weights.items():
        weight.data.copy_(weights[name])
    for batch in (batch for step in _batches(config, LOOKS, "heldout") for batch in step):
        loss = denoising_loss(engine, make_path(config.path), batch.to(ranks.device)).sum() / (LOOKS * BATCH)
        engine.backward(loss)
        total += loss.item()
    gradient = [weight.grad.flatten() for weight in engine.weights.values() if weight.grad is not None]
    return Look(torch.cat(predictions), torch.cat(gradient), total)


def saved_bytes() -> Figures:
    """Return the bytes kept for the backward pass for a token, channel and block: what 8 images keep more than 4."""
    figures: Figures = {}
    for name, law in {"fp32": FP32, **HALF}.items():
        network = _with_tokens(dit("S"), law)
        size = network.tokens * network.config.width * network.config.depth
        figures[f"bytes_{name}"] = (_saved(network, law, 8) - _saved(network, law, 4)) / (4 * size)
    return figures


def step_seconds() -> Figures:
    """Return seconds of forward and backward pass of 8 images. The laws take turns."""
    laws = {"fp32": FP32, **HALF}
    networks = {name: _with_tokens(dit("S"), law) for name, law in laws.items()}
    seconds: dict[str, list[float]] = {name: [] for name in laws}
    for turn in range(-1, ROUNDS):
        for name, law in laws.items():
            wait()
            start = time.perf_counter()
            _forward(networks[name], law, 8).backward()
            wait()
            if turn >= 0:  # the first turn warms up
                seconds[name].append(time.perf_counter() - start)
    ratios = [a / b for a, b in zip(seconds["fp32_tokens"], seconds["bf16_tokens"], strict=True)]
    figures = {f"seconds_{name}": statistics.median(times) for name, times in seconds.items()}
    return {**figures, "seconds_fp32_over_bf16_tokens": statistics.median(ratios)}


def _engine(ranks: Ranks, law: Law) -> tuple[Config, Engine]:
    config = load_config("configs/digits.yaml", [*DEEP, f"precision={law.precision}"])
    network = build_network(config, form_of(open_images(config.data)))
    return config, build_engine(config, config.optim, _with_tokens(network, law), ranks)


def _with_tokens(network: Backbone, law: Law) -> Backbone:
    """Cast what enters the first block: what blocks add to it has the same type then, so that it stays."""
    if law.tokens != torch.float32:
        network.blocks[0].register_forward_pre_hook(lambda block, inputs: (inputs[0].to(law.tokens), *inputs[1:]))
    return network


def _batches(config: Config, steps: int, split: Split = "train") -> Iterator[list[Batch]]:
    plan = Steps(config.groups, BATCH, config.model.slots, config.seed, 0, steps)
    return iter(open_images(config.data, split).batches(plan, lambda *_: None))


def _forward(network: Backbone, law: Law, images: int) -> Tensor:
    device = next(network.parameters()).device
    number = torch.arange(images, device=device)
    x = torch.randn(images, 4, 32, 32, device=device)
    with torch.autocast(device.type, torch.bfloat16, enabled=law.precision == "bf16"):
        return network(x, number / images, number, number, 4).square().mean()


def _saved(network: Backbone, law: Law, images: int) -> int:
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = _forward(network, law, images)
    del loss
    return sum(kept.values())


def _apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return _norm(a[name] - b[name] for name in b)


def _relative(a: Tensor, b: Tensor) -> float:
    return _norm([a - b]) / _norm([b])


def _norm(tensors: Iterable[Tensor]) -> float:
    return sum(tensor.double().square().sum().item() for tensor in tensors) ** 0.5
