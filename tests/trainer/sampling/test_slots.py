"""Rows of the sample embedding that each network call draws anew (sample.slots=redrawn)."""

import itertools

import numpy as np
import pytest
import torch

from data.randomness import Purpose, draw
from data.sets.registry import open_images
from models.backbones.registry import make_network
from trainer.config.tree import load_config
from trainer.errors import RunError
from trainer.ranks import Ranks, process_group
from trainer.sampling.generate import generate, generate_groups
from trainer.sampling.networks import Networks

SHAPE, CPU, SIZE, ROWS, SEED = (1, 8, 8), torch.device("cpu"), 4, 6, 11
GROUPS, CLASSES = np.array([7, 2, 5, 11]), np.array([3, 0, 1, 9])


def configured(tiny, *overrides):
    own = ["run=unused", "groups.size=4", f"model.max_group_size={ROWS}", f"sample.seed={SEED}", "sample.steps=4"]
    return load_config(tiny, [*own, "sample.slots=redrawn", *overrides])


@pytest.fixture(scope="module")
def network(tiny, random_weights):
    config = configured(tiny)
    return random_weights(make_network(config.model, *SHAPE[:2], 10, config.path.predictions), 0).eval()


def rows(group, evaluation, prediction):
    """Those of a group, by the documented formula: the order of uniform numbers of the generator, at its counter."""
    counter = np.array([0, 0, 2 * evaluation + prediction, group], np.uint64)
    philox = np.random.Philox(key=np.array([SEED, 3], np.uint64), counter=counter)
    return np.random.Generator(philox).random(ROWS).argsort()[:SIZE]


def slots(evaluation, prediction, groups=GROUPS):
    return torch.from_numpy(np.concatenate([rows(group, evaluation, prediction) for group in groups]))


class Recorder:
    """A network, and the slots that its calls had."""

    def __init__(self, network):
        self.network, self.slots = network, []

    def __call__(self, x, t, label, slot, group_size):
        self.slots.append(slot)
        return self.network(x, t, label, slot, group_size)


@pytest.mark.parametrize("sampler", ["euler", "heun", "pseudo_corrector", "sde", "ddim"])
@pytest.mark.parametrize("guidance", ["1.0", "1.5", "[1.0, 2.0]"])
def test_every_call_has_the_rows_of_the_formula(tiny, sampler, guidance):
    """Of its evaluation and prediction; no two images of a group share one."""
    config = configured(tiny, f"sample.sampler={sampler}", f"sample.guidance={guidance}")
    recorder = Recorder(lambda x, *others: x.sin())
    _, evaluations, _ = generate_groups(Networks(recorder), config, SHAPE, GROUPS, CLASSES, CPU)
    predictions = (0,) if guidance == "1.0" else (0, 1)
    expected = [slots(*call) for call in itertools.product(range(evaluations), predictions)]
    assert len(recorder.slots) == len(expected) and all(map(torch.equal, recorder.slots, expected))
    for call in recorder.slots:
        assert all(len(set(group)) == SIZE for group in call.view(-1, SIZE).tolist())
    assert len({tuple(call.tolist()) for call in recorder.slots}) == len(expected), "drawn anew"


def test_the_images_are_those_of_a_plain_loop(tiny, network):
    """Euler's method with guidance, written out."""
    config = configured(tiny, "sample.sampler=euler", "sample.guidance=1.7", "path=linear")
    made = generate_groups(Networks(network), config, SHAPE, GROUPS, CLASSES, CPU).images
    numbers = (SIZE * GROUPS[:, None] + np.arange(SIZE)).ravel()
    x = torch.from_numpy(draw(SEED, Purpose.SAMPLING, numbers, SHAPE, SIZE, ROWS).noise)
    label, null = torch.from_numpy(CLASSES.repeat(SIZE)), torch.full((16,), -1)
    with torch.no_grad():
        for step in range(4):
            t = torch.full((16,), step / 4)
            c, u = network(x, t, label, slots(step, 0), 1), network(x, t, null, slots(step, 1), SIZE)
            x = x + (u + 1.7 * (c - u)) / 4
    torch.testing.assert_close(made, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sampler", ["heun", "sde"])
def test_other_groups_of_a_batch_do_not_matter(tiny, network, sampler):
    config = configured(tiny, f"sample.sampler={sampler}")
    whole = generate_groups(Networks(network), config, SHAPE, GROUPS, CLASSES, CPU).images
    for i in ([0], [2, 3], [3, 1, 0]):
        own = generate_groups(Networks(network), config, SHAPE, GROUPS[i], CLASSES[i], CPU).images
        torch.testing.assert_close(own, whole.view(4, SIZE, *SHAPE)[i].flatten(0, 1), rtol=1e-4, atol=1e-4)
    fixed = config.model_copy(update={"sample": config.sample.model_copy(update={"slots": "fixed"})})
    other = generate_groups(Networks(network), fixed, SHAPE, GROUPS, CLASSES, CPU).images
    assert (other - whole).abs().flatten(1).amax(dim=1).min() > 1e-4


def made_by_ranks(config, network, out):
    with process_group() as ranks:
        made = generate(Networks(network), config, open_images(config.data), ranks)
        if ranks.rank == 0:
            torch.save(made.images, out)


def test_ranks_make_the_same(tiny, network, ranks, tmp_path):
    config = configured(tiny, "sample.per_class=3", "sample.batch=8")
    ranks.run(3, made_by_ranks, config, network, tmp_path / "made.pt")
    alone = generate(Networks(network), config, open_images(config.data), Ranks(0, 1, CPU)).images
    torch.testing.assert_close(torch.load(tmp_path / "made.pt"), alone, rtol=1e-4, atol=1e-4)


def test_where_calls_are_as_many_as_a_batch_needs_it_is_refused(tiny):
    with pytest.raises(RunError, match=r"^sample\.slots=redrawn: not for sampler=dopri5, .*; set fixed, or another"):
        configured(tiny, "sample.sampler=dopri5")
