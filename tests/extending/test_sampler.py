"""A sampler that keeps past slopes, Adams and Bashforth's of two steps. It is this file, and one line in SAMPLERS."""

import pytest
import torch

from models.paths.registry import PATHS, make_path, path_config
from models.sampling.registry import SAMPLERS, fitting_samplers
from models.sampling.samplers import Problem, Sampler, SamplerConfig, State, even_times
from tests.extending.toy import tiny, train_resume_and_sample
from trainer.errors import RunError

EVERY = [(name, path) for path in PATHS for name in fitting_samplers(make_path(path_config(path)))]


def adams_bashforth(problem, state):
    x, i, kept = state
    t, after = problem.times[i : i + 2]
    slope = problem.velocity(x, t)
    mean = (3 * slope - kept[0]) / 2 if kept else slope
    return State(x + (after - t) * mean, i + 1, (slope,))


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(SAMPLERS, "adams", Sampler(adams_bashforth, frozenset({"velocity"}), even_times))


def test_a_toy_sampler_samples_while_training_and_after(tmp_path):
    train_resume_and_sample(tmp_path, "sample.sampler=adams", "sample.steps=4", "train.sample_every=64")


def test_where_it_does_not_fit_is_said(tmp_path):
    with pytest.raises(RunError, match=r"^sample\.sampler=adams: not for path=ddpm; set ddim or ddpm"):
        tiny(tmp_path, "path=ddpm", "sample.sampler=adams")


@pytest.mark.parametrize(("name", "path"), [*EVERY, ("adams", "linear")])
def test_a_state_can_be_kept_and_gone_on_from_twice(name, path):
    """From any step, without what came after it or a call of the network more."""
    path, settings, steps = make_path(path_config(path)), SamplerConfig(tolerance=1e-2), 5
    sampler, calls = SAMPLERS[name], []

    def denoise(x, t):
        calls.append(t)
        return torch.cat([x.sin(), x.cos()], dim=1) if "posterior" in path.offers else x.sin()

    def draw(step):
        return torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(step))

    problem = Problem(denoise, path, sampler.times(path, steps, settings), draw, settings)
    start = State(path.start(draw(99)))
    whole, number = sampler.run(problem, start), len(calls)
    for middle in range(steps + 1):
        calls.clear()
        state = sampler.run(problem, start, until=middle)
        first, done = sampler.run(problem, state), len(calls)
        assert torch.equal(first.x, whole.x) and torch.equal(sampler.run(problem, state).x, whole.x)
        assert done == number and first.step == whole.step == len(problem.times) - 1


def test_the_pairs_that_fit_are_those_of_the_table():
    flows = ("linear", "gvp", "vp", "jit")
    table = {name: {*flows} for name in ("euler", "heun", "pseudo_corrector", "dopri5", "sde")}
    table |= {"ddim": {*flows, "ddpm"}, "ddpm": {"ddpm"}}
    assert {(name, path) for name, paths in table.items() for path in paths} == {*EVERY}
