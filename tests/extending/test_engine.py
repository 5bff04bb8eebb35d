"""How to add an engine: a class, and one line in ENGINES. Most are another engine with a difference, as this one."""

import torch

from tests.trainer.go_on import stored
from trainer.checkpoints.weights import WeightSource, find_checkpoint
from trainer.config.tree import load_config
from trainer.engines.build import ENGINES
from trainer.engines.single import Single
from trainer.loop import train
from trainer.sampling.samples import make_samples


class Patient(Single):
    """Leaves the weights alone in every second step, and adds its gradient to that of the next."""

    def step(self, lr):
        if self.steps % 2:
            return super().step(lr)
        self.update_averages()
        return torch.zeros(())


def test_an_engine_of_ones_own_trains_saves_resumes_and_samples(monkeypatch, tmp_path):
    monkeypatch.setitem(ENGINES, "patient", Patient)

    def run(images, name, *overrides):
        train(load_config("tests/trainer/tiny.yaml", [f"run={tmp_path}/{name}", f"train.images={images}", *overrides]))
        return stored(find_checkpoint(tmp_path / name))

    whole = run(128, "whole", "engine=patient")
    run(64, "stopped", "engine=patient")
    resumed = run(128, "stopped", "engine=patient")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert {int(whole[name]) for name in whole if name.endswith(".step")} == {2}, "of four"
    continued = run(160, "stopped", "engine=single")  # any engine resumes what another one saved
    assert {int(continued[name]) for name in continued if name.endswith(".step")} == {3}

    checkpoint = find_checkpoint(tmp_path / "whole")
    pixels, _, _ = make_samples(WeightSource(checkpoint), load_config(checkpoint / "config.yaml"))
    assert pixels.shape[:2] == (10, 2)  # groups, images of each
