"""How to add a metric: a statistic, a formula, and one line in METRICS."""

import json
import runpy

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.trainer import detectors
from trainer.checkpoints.weights import WeightSource, find_checkpoint
from trainer.config.tree import load_config
from trainer.errors import RunError
from trainer.evaluation.metric import Metric, Side, Statistic
from trainer.evaluation.metrics import METRICS
from trainer.loop import train
from trainer.ranks import Ranks
from trainer.sampling.samples import make_samples, write_samples


class Brightness:
    """The mean of all pixels; this is all that a metric's own file has to have, but for `BRIGHTNESS` below."""

    def __init__(self, width: int, images: int, device: torch.device) -> None:
        self._sum = torch.zeros(2, dtype=torch.float64, device=device)  # of pixels, and their number

    def add(self, values: Tensor, numbers: Tensor) -> None:
        self._sum += torch.tensor([float(values.double().sum()), values.numel()], dtype=torch.float64)

    def reduce(self, ranks: Ranks) -> None:
        dist.all_reduce(self._sum)

    def value(self) -> tuple[np.ndarray]:
        return ((self._sum[0] / self._sum[1]).cpu().numpy(),)


MEAN_PIXEL = Statistic("brightness", "pixels", Brightness, ("brightness",))


def difference(generated: Side, real: Side, device: torch.device) -> float:
    return abs(float(generated["brightness"][0] - real["brightness"][0]))


BRIGHTNESS = Metric("brightness", needs=(MEAN_PIXEL,), kinds=frozenset({"torchscript"}), compute=difference)


def evaluate(*arguments):
    runpy.run_path("tools/evaluate.py")["main"]([str(argument) for argument in arguments])


def test_a_metric_of_ones_own_is_computed_for_a_run_by_the_tool(monkeypatch, tmp_path):
    monkeypatch.setitem(METRICS, "brightness", BRIGHTNESS)

    run = tmp_path / "run"
    config = load_config("tests/trainer/tiny.yaml", [f"run={run}", "engine=single", "train.images=64"])
    train(config)
    write_samples(run, *make_samples(WeightSource(find_checkpoint(run)), config), config.sample.group_size)
    real = detectors.save_images(tmp_path / "real.npz", 50, seed=2, side=8, channels=1)
    detectors.save(detectors.Plain(6), tmp_path / "plain.pt")
    arguments = run, "--detector", tmp_path / "plain.pt", "--reference", tmp_path / "real.npz"

    evaluate(*arguments, "--metrics", "fid")  # which puts statistics of the reference into the cache: without ours
    evaluate(*arguments, "--metrics", "brightness,fid")
    evaluate(*arguments)
    before, found, everything = map(json.loads, (run / "evaluations.jsonl").read_text().splitlines())
    made = np.load(run / "samples.npz")["arr_0"]
    assert found["brightness"] == pytest.approx(abs(made.mean() - real.mean()), rel=1e-9)
    assert found["fid"] == before["fid"] and everything["brightness"] == found["brightness"]
    assert set(everything) > {"fid", "kid", "precision", "recall", "brightness"}


def test_a_metric_that_does_not_exist_is_refused_in_one_line(tmp_path):
    detectors.save_images(tmp_path / "real.npz", 50, seed=2, side=8, channels=1)
    detectors.save(detectors.Plain(6), tmp_path / "plain.pt")
    real = tmp_path / "real.npz"
    with pytest.raises(RunError, match=r"--metrics brightness: .*plain.pt offers fid, kid, precision, recall; leave"):
        evaluate("--images", real, "--detector", tmp_path / "plain.pt", "--reference", real, "--metrics", "brightness")
