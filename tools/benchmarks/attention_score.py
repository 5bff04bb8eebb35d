"""What measuring attention costs in training: one measurement with its picture, over the steps between two of them."""

import statistics
import time

import torch

from benchmarks import Figures, Targets
from benchmarks.group import step_seconds
from benchmarks.network import dit
from data.batches.batch import Batch
from models.paths.flows import LinearFlow
from trainer.analysis.attention_plots import level_map, picture
from trainer.analysis.cross_attention import step_attention
from trainer.config.tree import TrainConfig
from trainer.engines.build import build_engine
from trainer.engines.config import EngineConfig, OptimConfig
from trainer.ranks import process_group

GROUP_SIZE, ROUNDS = 4, 7


def measure() -> tuple[Figures, Targets]:
    """DiT-S/2, 8 images (DiT-XL/2, 64 images, bf16 on a GPU) in groups, beside a step of as many images alone, the
    cheaper kind. They take turns. A measurement is of one step's images, so a larger batch has the same ratio, and the
    share is that of the default batch and interval; the picture's time does not grow."""
    gpu = torch.cuda.is_available()
    images, size = (64, "XL") if gpu else (8, "S")
    seconds: dict[str, list[float]] = {"step": [], "attention": [], "picture": []}
    with process_group() as ranks:
        network = dit(size).to(ranks.device)
        config = EngineConfig.model_validate({"engine": "single", "precision": "bf16" if gpu else "fp32"})
        engine, path, batch = (
            build_engine(config, OptimConfig.model_validate({}), network, ranks),
            LinearFlow(),
            _batch(images),
        )
        for i in range(-1, ROUNDS):
            step = step_seconds(network, images, (1,), 1)[1][0]
            start = time.perf_counter()
            with engine.ema_weights():
                attention = step_attention(engine, path, [batch], ranks.device)  # ends on the CPU: nothing to wait for
            measured = time.perf_counter()
            picture(level_map(attention, GROUP_SIZE))
            drawn = time.perf_counter()
            if i >= 0:  # the first turn warms up
                for name, value in (("step", step), ("attention", measured - start), ("picture", drawn - measured)):
                    seconds[name].append(value)
    train = TrainConfig.model_validate({})
    steps, larger = train.attention_every / train.global_batch, train.global_batch / images
    turns = zip(*seconds.values(), strict=True)
    shares = [(attention * larger + drawing) / (step * larger * steps) for step, attention, drawing in turns]
    figures: Figures = {f"{name}_seconds": statistics.median(values) for name, values in seconds.items()}
    ratios = [attention / step for attention, step in zip(seconds["attention"], seconds["step"], strict=True)]
    figures |= {"attention_over_step": statistics.median(ratios), "share_of_training": statistics.median(shares)}
    return figures, {"share_of_training": ("<", 0.01)}


def _batch(images: int) -> Batch:
    x, noise = torch.randn(2, images, 4, 32, 32).unbind()
    number = torch.arange(images)
    kind = torch.zeros(images, dtype=torch.bool)
    return Batch(x, noise, torch.rand(images), number, number % GROUP_SIZE, kind, GROUP_SIZE, in_groups=True)
