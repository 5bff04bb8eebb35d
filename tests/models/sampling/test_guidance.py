import math

import pytest
import torch

from models.backbones.embeddings import NULL_LABEL
from models.paths.registry import PATHS, LinearFlow
from models.sampling.guidance import Guidance, Networks
from models.sampling.guidance import guided as guided_on
from models.sampling.registry import SAMPLERS
from models.sampling.samplers import Problem, SamplerConfig, State

SEEDS = range(4)
LABEL = torch.tensor([3, 3, 3, 3, 1, 1, 1, 1])
SLOT = torch.tensor([5, 2, 7, 0, 1, 6, 3, 4])


def fixed(prediction):
    return SLOT


class Recorder:
    """A network, and with which (label, slot, group size, time) it was called."""

    def __init__(self, network):
        self.network, self.calls = network, []

    def __call__(self, x, t, label, slot, group_size):
        self.calls.append((label.tolist(), slot.tolist(), group_size, t.tolist()))
        return self.network(x, t, label, slot, group_size)


def group_mean(x, t, label, slot, group_size):
    """Looks at all it is given: image, mean of its group, label, slot, time."""
    mean = x.unflatten(0, (-1, group_size)).mean(dim=1).repeat_interleave(group_size, dim=0)
    return x.sin() + 0.7 * mean + (label + 0.1 * slot + t).view(-1, 1, 1, 1)


def noise(seed):
    return torch.randn(8, 3, 2, 2, generator=torch.Generator().manual_seed(seed))


def guided(network, weight, c=1, uc=1, interval=None, weaker=None):
    return guided_on(Networks(network, weaker), LinearFlow(), Guidance(weight, c, uc, interval), LABEL, fixed)


def expected(x, t, weight, c, uc):
    time = torch.full((8,), t)
    conditional = group_mean(x, time, LABEL, SLOT, c)
    unconditional = group_mean(x, time, torch.full((8,), NULL_LABEL), SLOT, uc)
    return (1 - weight) * unconditional + weight * conditional


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("c", "uc"), [(1, 1), (1, 4), (4, 4), (2, 8), (8, 1)])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0, 1.65, 4.0])
def test_guidance_is_the_line_through_both_predictions(seed, c, uc, weight):
    x, t = noise(seed), 0.3
    torch.testing.assert_close(guided(group_mean, weight, c, uc)(x, t), expected(x, t, weight, c, uc))


@pytest.mark.parametrize("seed", SEEDS)
def test_each_image_is_guided_by_its_own_weight(seed):
    x, t, weight = noise(seed), 0.3, torch.tensor([0.0, 1.0, 1.5, 4.0, 1.0, 2.0, 0.3, 1.0])
    out = guided(group_mean, weight, 2, 4)(x, t)
    for i, own in enumerate(weight.tolist()):
        torch.testing.assert_close(out[i], expected(x, t, own, 2, 4)[i])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("weight", [1, 1.0])
@pytest.mark.parametrize(("c", "uc"), [(1, 4), (4, 4), (8, 2)])
def test_weight_1_is_the_conditional_prediction_alone(seed, c, uc, weight):
    network, weaker = Recorder(group_mean), Recorder(group_mean)
    x = noise(seed)
    for others in ({}, {"weaker": weaker}):
        network.calls.clear()
        out = guided(network, weight, c, uc, **others)(x, 0.5)
        assert torch.equal(out, group_mean(x, torch.full((8,), 0.5), LABEL, SLOT, c))
        assert network.calls == [(LABEL.tolist(), SLOT.tolist(), c, [0.5] * 8)]
    assert not weaker.calls


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("c", "uc"), [(1, 4), (4, 4), (8, 2)])
def test_weights_of_1_make_the_calls_that_others_make(seed, c, uc):
    network, x = Recorder(group_mean), noise(seed)
    out = guided(network, torch.ones(8), c, uc)(x, 0.5)
    torch.testing.assert_close(out, group_mean(x, torch.full((8,), 0.5), LABEL, SLOT, c))
    assert [call[2] for call in network.calls] == [c, uc]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("c", "uc"), [(1, 4), (4, 4), (8, 2)])
def test_weight_0_is_the_unconditional_prediction(seed, c, uc):
    x = noise(seed)
    out = guided(group_mean, 0, c, uc)(x, 0.5)
    assert torch.equal(out, group_mean(x, torch.full((8,), 0.5), torch.full((8,), NULL_LABEL), SLOT, uc))


@pytest.mark.parametrize(("c", "uc"), [(1, 4), (4, 2), (8, 8)])
def test_each_prediction_gets_its_own_group_size_and_labels(c, uc):
    network = Recorder(group_mean)
    guided(network, 2.5, c, uc)(noise(0), 0.25)
    conditional = (LABEL.tolist(), SLOT.tolist(), c, [0.25] * 8)
    unconditional = ([NULL_LABEL] * 8, SLOT.tolist(), uc, [0.25] * 8)
    assert sorted(network.calls) == sorted([conditional, unconditional])


@pytest.mark.parametrize("seed", SEEDS)
def test_a_weaker_network_takes_the_place_of_the_unconditional_prediction(seed):
    """With the label, and at group size C."""
    network, x, t = Recorder(group_mean), noise(seed), 0.4
    weaker = Recorder(lambda *args: group_mean(*args).cos())
    out = guided(network, 1.7, 2, 8, weaker=weaker)(x, t)
    call = (LABEL.tolist(), SLOT.tolist(), 2, torch.full((8,), t).tolist())
    assert network.calls == weaker.calls == [call]
    strong = group_mean(x, torch.full((8,), t), LABEL, SLOT, 2)
    torch.testing.assert_close(out, strong.cos() + 1.7 * (strong - strong.cos()))


@pytest.mark.parametrize("channels", [None, 1, 2, 3, 4, 6, 100])
@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("weaker", [None, lambda *args: twice(*args).cos()])
def test_only_the_first_channels_are_guided_and_a_variance_never(channels, learns, weaker):
    """Also where as many channels are asked for as the network has with those of the variance, or more."""

    def network(*args):
        return twice(*args) if learns else group_mean(*args)

    def guide(*args):
        return weaker(*args)[:, : 6 if learns else 3] if weaker else None

    x, t = noise(0), torch.full((8,), 400.0)
    networks = Networks(network, guide if weaker else None)
    out = guided_on(networks, PATHS["ddpm"](), Guidance(2.5, 1, 4, channels=channels), LABEL, fixed)(x, 400)
    c, u = network(x, t, LABEL, SLOT, 1), network(x, t, torch.full((8,), NULL_LABEL), SLOT, 4)
    u = guide(x, t, LABEL, SLOT, 1) if weaker else u
    first = min(channels or 3, 3)
    torch.testing.assert_close(out[:, :first], (u + 2.5 * (c - u))[:, :first])
    assert torch.equal(out[:, first:], c[:, first:])
    assert out.shape == c.shape


def twice(*args):
    """A network that learns its variance."""
    return torch.cat([group_mean(*args), group_mean(*args).sin()], dim=1)


@pytest.mark.parametrize("seed", SEEDS)
def test_group_sizes_change_nothing_for_a_network_that_ignores_its_group(seed):
    def network(x, t, label, slot, group_size):
        return group_mean(x, t, label, slot, 1)

    outs = [guided(network, 1.7, c, uc)(noise(seed), 0.6) for c in (1, 2, 4, 8) for uc in (1, 2, 4, 8)]
    assert all(torch.equal(out, outs[0]) for out in outs)
    other = [guided(group_mean, 1.7, c, uc)(noise(seed), 0.6) for c, uc in ((1, 1), (2, 1), (1, 2), (2, 2))]
    assert all(not torch.allclose(a, b) for i, a in enumerate(other) for b in other[:i])


def test_a_bf16_network_is_guided_in_fp32():
    x = noise(0)
    out = guided(lambda *args: group_mean(*args).bfloat16(), 2.5, 1, 4)(x, 0.3)
    time = torch.full((8,), 0.3)
    c = group_mean(x, time, LABEL, SLOT, 1).bfloat16().float()
    u = group_mean(x, time, torch.full((8,), NULL_LABEL), SLOT, 4).bfloat16().float()
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, u + 2.5 * (c - u), rtol=1e-6, atol=1e-6)


def guided_times(weight, interval, sampler, steps):
    """The times at which the sampler's evaluations were guided, and all times."""
    network, path = Recorder(group_mean), LinearFlow()
    times = SAMPLERS[sampler].times(path, steps, SamplerConfig())
    problem = Problem(guided(network, weight, 1, 4, interval), path, times, None, SamplerConfig())
    SAMPLERS[sampler].run(problem, State(noise(0)))
    unconditional = [times[0] for label, _, _, times in network.calls if label[0] == NULL_LABEL]
    return unconditional, [times[0] for label, _, _, times in network.calls if label[0] != NULL_LABEL]


BOTH = pytest.mark.parametrize("sampler", ["euler", "heun"])


@BOTH
def test_only_within_the_interval_of_log_snr_there_is_guidance(sampler):
    low, high = 2 * math.log(0.25 / 0.75), 2 * math.log(0.75 / 0.25)  # SiT guides for t in [0.25, 0.75]
    with_guidance, times = guided_times(2.5, (low - 1e-6, high + 1e-6), sampler, 8)
    assert with_guidance == [t for t in times if 0.25 <= t <= 0.75]
    assert len(with_guidance) < len(times)


@BOTH
def test_an_interval_of_low_log_snr_guides_the_noisy_end_and_one_of_high_the_clean_end(sampler):
    noisy, times = guided_times(2.5, (-math.inf, -0.5), sampler, 10)
    assert noisy == [t for t in times if t < 0.43]
    clean, times = guided_times(2.5, (0.5, math.inf), sampler, 10)
    assert clean == [t for t in times if t > 0.57]


@pytest.mark.parametrize("seed", SEEDS)
def test_outside_the_interval_the_prediction_is_the_conditional_and_inside_it_is_guided(seed):
    x = noise(seed)
    velocity = guided(group_mean, 2.5, 1, 4, (-1.0, 1.0))
    for t in (0.05, 0.35, 0.65, 0.95):
        torch.testing.assert_close(velocity(x, t), expected(x, t, 1.0, 1, 4), rtol=0, atol=0)
    for t in (0.4, 0.5, 0.6):
        torch.testing.assert_close(velocity(x, t), expected(x, t, 2.5, 1, 4))


@pytest.mark.parametrize("steps", [2, 4, 5, 8, 10, 20, 50])
def test_both_ends_of_the_interval_are_guided(steps):
    """An interval of one point, and one that starts or ends there: at every time that a sampler visits."""
    for i in range(1, steps):
        t = i / steps
        end = LinearFlow().log_snr(torch.tensor(t, dtype=torch.float64)).item()
        for interval in ((end, end), (end, math.inf), (-math.inf, end)):
            network = Recorder(group_mean)
            guided(network, 2.0, interval=interval)(noise(0), t)
            assert len(network.calls) == 2, f"t={t}, interval={interval}"


def test_no_interval_guides_everywhere():
    with_guidance, times = guided_times(2.5, None, "heun", 4)
    assert with_guidance == times
    with_guidance, times = guided_times(2.5, (-math.inf, math.inf), "heun", 4)
    assert with_guidance == times


@pytest.mark.parametrize("size", [3, 5, 16])
def test_a_group_size_that_does_not_divide_the_batch_is_an_error_that_names_it(size):
    with pytest.raises(ValueError, match=rf"\bcond_group_size={size}\b.*\b8\b"):
        guided(group_mean, 1.5, c=size)
    with pytest.raises(ValueError, match=rf"\buncond_group_size={size}\b.*\b8\b"):
        guided(group_mean, 1.5, uc=size)
