"""A path, x_t = t x + (1 - t)^p noise, and a distribution of timesteps that begins with the noisy ones. They are this
file, a line in PATHS and a line in TIMESTEPS."""

import pytest
import torch
from pydantic import Field

from models.paths.base import NoisePath, PathConfig, Schedule
from models.paths.registry import PATHS, make_path, path_config
from models.paths.timesteps import TIMESTEPS, Timesteps
from tests.extending.toy import tiny, train_resume_and_sample
from trainer.errors import RunError


class Bent(NoisePath):
    class Config(PathConfig):
        default_timesteps = "noisy_first"

        name: str = "bent"
        """The path between noise and data."""
        power: float = Field(2.0, ge=1)
        """Power of the share of noise."""

    def schedule(self, t):
        t, p = t.double(), self.config.power
        return Schedule(t, (1 - t) ** p, torch.ones_like(t), -p * (1 - t) ** (p - 1))


def noisy_first(u, position, settings):
    """Times up to a half only, for the first 64 images."""
    return u / 2 if position < 64 else u


@pytest.fixture(autouse=True)
def bent(monkeypatch):
    monkeypatch.setitem(PATHS, "bent", Bent)
    monkeypatch.setitem(TIMESTEPS, "noisy_first", Timesteps(noisy_first))


def test_a_toy_path_trains_resumes_and_samples(tmp_path):
    for sampler in ("heun", "ddim"):
        overrides = ("path.name=bent", "path.power=1.5", f"sample.sampler={sampler}", "groups.window=[null,0]")
        train_resume_and_sample(tmp_path / sampler, *overrides)


def test_its_distribution_of_timesteps_depends_on_the_images_seen():
    path, u = make_path(path_config("bent")), torch.rand(100)
    assert torch.equal(path.timestep(u, 0), u / 2) and torch.equal(path.timestep(u, 64), u)


def test_what_does_not_fit_is_named_with_its_fix(tmp_path):
    with pytest.raises(RunError, match=r"^sample\.sampler=ddpm: not for path=bent; set euler or heun or .* or ddim"):
        tiny(tmp_path, "path=bent", "sample.sampler=ddpm")
    with pytest.raises(RunError, match=r"^path\.timesteps=noisy_first: not with name=ddpm; set discrete"):
        tiny(tmp_path, "path.name=ddpm", "path.timesteps=noisy_first", "sample.sampler=ddim")
    with pytest.raises(RunError, match=r"^path\.power=2: is for name=bent; leave it out"):
        tiny(tmp_path, "path.power=2")
