"""Periodic work while training, with the averaged weights: samples, their metrics, attention in groups."""

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.batches.batch import Batch
from data.sets.form import form_of
from data.sets.images import Images
from data.sets.registry import open_halves
from models.paths.base import NoisePath
from models.sampling.generation import Sampled
from trainer.analysis.cross_attention import CrossAttention, step_attention
from trainer.checkpoints.weights import WeightSource
from trainer.config.tree import Config
from trainer.engines.base import Engine
from trainer.errors import RunError
from trainer.evaluation.precision_recall import NEIGHBOURS
from trainer.monitor import Monitor
from trainer.ranks import Ranks, from_rank_0
from trainer.sampling.decode import make_decoder
from trainer.sampling.finite import not_finite
from trainer.sampling.generate import generate
from trainer.sampling.networks import Networks
from trainer.sampling.pictures import classes_shown, grid, to_uint8
from trainer.sampling.samples import describe


class Periodic:
    """Samples, evaluations and attention scores at their intervals. All ranks take part. Training is unaffected:
    nothing is drawn from its random streams, no gradient computed. What would fail hours later fails at creation."""

    def __init__(self, config: Config, images: Images, ranks: Ranks) -> None:
        self._config, self._images, self._ranks = config, form_of(images), ranks
        self._attention_due = False
        if config.evaluate.every:
            from_rank_0(lambda: bool(self._decoder()))
        if config.train.sample_every:
            self._height = from_rank_0(lambda: Generated(torch.zeros(1, *images.shape), self._decoder()).shape[0])
        self._compute_metrics = make_evaluation(config, images, ranks) if config.evaluate.every else None

    def catch_up(self, engine: Engine, batch: int, position: int, monitor: Monitor) -> None:
        """Before the first step, evaluate at `position` if that was due but the run ended first."""
        every = self._config.evaluate.every
        due = every and position and has_passed(every, position - batch, position)
        if due and from_rank_0(lambda: not monitor.has_evaluation(position)):
            self._evaluate(engine, position, monitor)

    def due(self, before: int, position: int) -> bool:
        """Return whether something may be due as the images seen go from `before` to `position`."""
        train, evaluate = self._config.train, self._config.evaluate
        intervals = (train.sample_every, evaluate.every, train.attention_every)
        return self._attention_due or any(every and has_passed(every, before, position) for every in intervals)

    def run(
        self, engine: Engine, path: NoisePath, before: int, position: int, step: list[Batch], monitor: Monitor
    ) -> None:
        """Do what is due after a step, given its micro-batches, as the images seen went from `before` to `position`."""
        config, train = self._config, self._config.train

        def passed(every: int) -> bool:
            return bool(every) and has_passed(every, before, position)

        if passed(train.sample_every):
            classes = classes_shown(self._images.num_classes, self._height)
            with engine.ema_weights():
                made = generate(Networks(engine), config, self._images, self._ranks, classes=classes)
            if self._usable(made, f"no samples at {position} images", monitor) and self._ranks.rank == 0:
                pixels = to_uint8(self._decoder()(made.images))
                monitor.picture("samples", grid(pixels, config.sample.group_size), position)
        if passed(config.evaluate.every):
            self._evaluate(engine, position, monitor)
        self._attention_due |= passed(train.attention_every)
        if self._attention_due and any(micro.group_size > 1 for micro in step):
            with engine.ema_weights():
                attention = step_attention(engine, path, step, self._ranks.device)
            _show_attention(attention, config.groups.size, position, monitor)
            self._attention_due = False

    def _evaluate(self, engine: Engine, position: int, monitor: Monitor) -> None:
        config = evaluation_config(self._config)
        with engine.ema_weights():
            made = generate(Networks(engine), config, self._images, self._ranks)
        if not self._usable(made, f"no evaluation at {position} images", monitor):
            return
        assert self._compute_metrics  # evaluate.every is set
        record = self._compute_metrics(made.images)
        if record is not None:  # on rank 0
            about = describe(WeightSource(None), config) | {"position": position}
            monitor.evaluation(record | {"samples": about}, position)

    def _usable(self, made: Sampled, otherwise: str, monitor: Monitor) -> bool:
        """Return whether all samples are finite, alike on all ranks; if not, say so: the run goes on."""
        if wrong := not_finite(made, self._config.sample, WeightSource(None).weights):
            monitor.say(f"error: {otherwise}: {wrong}")
        return not wrong

    def _decoder(self) -> Callable[[Tensor], Tensor]:
        return make_decoder(self._images.vae, self._images.shape[0], self._ranks.device)


def _show_attention(attention: CrossAttention, group_size: int, position: int, monitor: Monitor) -> None:
    """Report how images of a group attend to one another: means over layers and noise levels, and a map of them."""
    monitor.scalar("attention/s_cross", attention.mean_s_cross, position)
    monitor.scalar("attention/cross_share", attention.mean_cross_share, position)
    if monitor.writes:
        from trainer.analysis.attention_plots import level_map, picture  # matplotlib takes a second to import

        monitor.picture("attention/by_layer_and_level", picture(level_map(attention, group_size)), position)


def has_passed(every: int, before: int, position: int) -> bool:
    """Return whether a multiple of `every` images lies in (before, position]."""
    return position // every > before // every


def evaluation_config(config: Config) -> Config:
    """Return the config of the samples to evaluate: as for the sample grids, but `evaluate.per_class` of each class."""
    sample = config.sample.model_copy(update={"per_class": config.evaluate.per_class, "labels": "balanced"})
    return config.model_copy(update={"sample": sample})


def make_evaluation(config: Config, images: Images, ranks: Ranks) -> Callable[[Tensor], dict | None]:
    """Return a function that takes samples (classes, per_class, C, H, W), the same on all ranks, and returns their
    metrics on rank 0: by evaluate.detector, or by a small classifier of the images. All ranks call both."""
    settings, number = config.evaluate, images.num_classes * config.evaluate.per_class
    if number <= NEIGHBOURS:
        raise RunError(f"evaluate.per_class={settings.per_class}: {number} images; set more than {NEIGHBOURS}")
    decode = make_decoder(images.vae, images.shape[0], ranks.device)
    if settings.detector:
        from trainer.evaluation import by_detector  # its libraries are slow to import
        from trainer.evaluation.groups import make_groups

        metrics = list(settings.metrics) if settings.metrics else None
        shape = Generated(torch.zeros(1, *images.shape), decode).shape
        detector = by_detector.open_detector(settings.detector, ranks)
        label = np.arange(images.num_classes).repeat(settings.per_class)
        groups = make_groups(label, config.sample.group_size)
        evaluate = by_detector.make_evaluator(detector, shape, Path(str(settings.reference)), metrics, ranks, groups)
        return lambda samples: evaluate(Generated(samples.flatten(0, 1), decode))

    from trainer.evaluation.classifier import make_evaluator

    if ranks.rank:
        return lambda samples: None
    classify = make_evaluator(*open_halves(config.data))

    def compute(samples: Tensor) -> dict:
        label = np.arange(images.num_classes).repeat(settings.per_class)
        pixels = to_uint8(decode(samples))
        return classify(pixels.reshape(-1, *pixels.shape[2:]), label, config.sample.group_size)

    return compute


class Generated:
    """An ImageSet of samples (n, C, H, W), latents or pixels in [-1, 1], decoded when they are read."""

    def __init__(self, samples: Tensor, decode: Callable[[Tensor], Tensor]) -> None:
        self._samples, self._decode, self._lock = samples, decode, threading.Lock()
        self.shape = self.read(0, 1).shape[1:]

    def __len__(self) -> int:
        return len(self._samples)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Implement ImageSet.read; one thread at a time, because decoding takes the device's memory."""
        with self._lock:
            return to_uint8(self._decode(self._samples[start:stop]))
