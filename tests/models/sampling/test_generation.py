import math

import pytest
import torch

from models.paths.registry import PATHS, LinearFlow, make_path, path_config
from models.sampling.generation import SampleConfig, sample_images
from models.sampling.guidance import Networks
from models.sampling.registry import SAMPLERS, fitting_samplers

SEEDS = range(3)
LABEL = torch.tensor([3, 3, 3, 3, 1, 1, 1, 1])
PATH = LinearFlow()


def sampled(net, config, noise, label, slot, path=PATH, **others):
    """The images alone, guided as the config says."""
    return sample_images(Networks(net, **others), path, config, noise, label, slot, config.guidance[0], no_draw)[0]


def no_draw(step):
    raise AssertionError(f"step {step}: these samplers take no noise")


@pytest.mark.parametrize(
    ("variant", "size", "c", "uc"),
    [("none", 1, 1, 1), ("light", 4, 1, 4), ("full", 4, 4, 4), ("light", 1, 1, 1), ("light", 16, 1, 16)],
)
def test_the_variant_gives_c_and_uc(variant, size, c, uc):
    config = SampleConfig().for_variant(variant, size, None)
    assert (config.cond_group_size, config.uncond_group_size) == (c, uc)
    assert config.group_size == max(c, uc)


def test_group_sizes_that_are_given_stay_and_so_does_all_else():
    given = SampleConfig(cond_group_size=2, uncond_group_size=8, steps=7, guidance=3, interval=(-1, 2), seed=5)
    for variant in ("none", "light", "full"):
        assert given.for_variant(variant, 1, None) == given
    config = SampleConfig(uncond_group_size=8, steps=7).for_variant("full", 4, None)
    assert (config.cond_group_size, config.uncond_group_size, config.group_size, config.steps) == (4, 8, 8, 7)
    assert config.for_variant("none", 1, None) == config


@pytest.mark.parametrize(("c", "uc"), [(2, 3), (4, 6), (6, 4)])
def test_group_sizes_of_which_none_divides_the_other_are_an_error(c, uc):
    with pytest.raises(ValueError, match=f"cond_group_size={c}.*divide"):
        SampleConfig(cond_group_size=c, uncond_group_size=uc).for_variant("full", 4, None)
    with pytest.raises(ValueError, match="divide"):
        SampleConfig(uncond_group_size=uc).for_variant("full", c, None)


@pytest.mark.parametrize("name", ["interval", "group_window"])
def test_an_interval_or_window_upside_down_is_an_error(name):
    with pytest.raises(ValueError, match=rf"sample.{name}=\[2.0, -1.0\]: lowest log-SNR first"):
        SampleConfig(**{name: (2, -1)}).for_variant("light", 4, None)
    assert getattr(SampleConfig(**{name: (1, 1)}).for_variant("light", 4, None), name) == (1, 1)


def test_groups_share_attention_where_they_did_in_training_unless_told_otherwise():
    assert SampleConfig().for_variant("light", 4, None).group_window is None
    assert SampleConfig().for_variant("light", 4, (-3, 1)).group_window == (-3, 1)
    assert SampleConfig(group_window=(-2, 2)).for_variant("light", 4, (-3, 1)).group_window == (-2, 2)


def test_guidance_is_one_weight_or_several():
    assert SampleConfig(guidance=2).guidance == (2,)
    assert SampleConfig(guidance=[1, 2.5]).guidance == (1, 2.5)
    for wrong in ([], [1, -2], math.inf, math.nan, "strong"):
        with pytest.raises(ValueError, match="guidance"):
            SampleConfig(guidance=wrong)


@pytest.mark.parametrize(
    "values",
    [
        {"sampler": "dopri"},
        {"steps": 0},
        {"guidance": -1},
        {"cond_group_size": 0},
        {"guided_channels": 0},
        {"small_share": 1.1},
        {"tolerance": 0},
        {"diffusion": "brownian"},
        {"diffusion_norm": 0},
    ],
)
def test_an_impossible_setting_is_an_error_that_names_it(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        SampleConfig(**values)


def setting(seed, random_inputs):
    noise, _, _, slot = random_inputs(seed, 8, 4)
    config = SampleConfig(steps=3, guidance=1.8, interval=(-3, 3)).for_variant("light", 4, None)
    return config, noise, slot


@pytest.mark.parametrize("seed", SEEDS)
def test_permuting_the_images_of_a_group_permutes_the_samples(random_dit, random_inputs, shuffled_groups, seed):
    net, (config, noise, slot) = random_dit(seed), setting(seed, random_inputs)
    order = shuffled_groups(seed, 8, 4)
    samples = sampled(net, config, noise, LABEL, slot)
    moved = sampled(net, config, noise[order], LABEL[order], slot[order])
    torch.testing.assert_close(moved, samples[order], rtol=0, atol=1e-5)
    assert samples.shape == noise.shape
    assert not samples.requires_grad


@pytest.mark.parametrize("seed", SEEDS)
def test_the_samples_of_a_group_depend_on_it_alone(random_dit, random_inputs, seed):
    net, (config, noise, slot) = random_dit(seed), setting(seed, random_inputs)
    samples = sampled(net, config, noise, LABEL, slot)
    for group in (slice(0, 4), slice(4, 8)):
        alone = sampled(net, config, noise[group], LABEL[group], slot[group])
        torch.testing.assert_close(alone, samples[group], rtol=0, atol=1e-5)
    apart = sampled(net, config.for_variant("none", 1, None), noise, LABEL, slot)
    torch.testing.assert_close(apart, samples)  # C and UC are already given
    single = config.model_copy(update={"uncond_group_size": 1})
    assert (sampled(net, single, noise, LABEL, slot) - samples).abs().flatten(1).amax(1).min() > 1e-4


@pytest.mark.parametrize("seed", SEEDS)
def test_sampler_steps_and_guidance_of_the_configuration_are_those_used(random_dit, random_inputs, seed):
    """One Euler step from t = 0: noise + u + w (c - u)."""
    net, (_, noise, slot) = random_dit(seed), setting(seed, random_inputs)
    zero, null = torch.zeros(8), torch.full((8,), -1)
    c, u = (net(noise, zero, label, slot, n) for label, n in ((LABEL, 1), (null, 4)))
    config = SampleConfig(sampler="euler", steps=1, guidance=1.8).for_variant("light", 4, None)
    samples = sampled(net, config, noise, LABEL, slot)
    torch.testing.assert_close(samples, noise + u + 1.8 * (c - u), rtol=0, atol=1e-5)
    outside = config.model_copy(update={"interval": (-3.0, 3.0)})  # t = 0 is log-SNR -inf
    samples = sampled(net, outside, noise, LABEL, slot)
    torch.testing.assert_close(samples, noise + c, rtol=0, atol=1e-5)


class Counted:
    """A network that counts its calls."""

    def __init__(self, net):
        self.net, self.calls = net, 0

    def __call__(self, *args):
        self.calls += 1
        return self.net(*args)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_the_evaluations_of_every_sampler_are_counted(random_inputs, path, name):
    """With guidance two calls of the network are one evaluation; with weight 1 every evaluation is one call."""
    if name not in fitting_samplers(PATHS[path]()):
        return

    def net(x, *others):
        return torch.cat([x, x], dim=1).sin() if path == "ddpm" else x.sin()

    (_, noise, slot), steps = setting(0, random_inputs), 6
    for weight, calls in ((1.0, 1), (2.0, 2)):
        config = SampleConfig(sampler=name, steps=steps, guidance=weight, tolerance=0.1).for_variant("light", 4, None)
        counted = Counted(net)
        arguments = (config, noise, LABEL, slot, weight, lambda i: torch.zeros_like(noise))
        images, evaluations, _ = sample_images(Networks(counted), PATHS[path](), *arguments)
        assert counted.calls == calls * evaluations
        assert images.shape == noise.shape and images.dtype == noise.dtype and images.isfinite().all()
        expected = {"heun": 11 if path == "jit" else 12, "pseudo_corrector": 7, "dopri5": evaluations}.get(name, steps)
        assert evaluations == expected
        assert name != "dopri5" or evaluations >= 7


@pytest.mark.parametrize("seed", SEEDS)
def test_each_group_is_sampled_with_its_own_weight(random_dit, random_inputs, seed):
    net, (config, noise, slot) = random_dit(seed), setting(seed, random_inputs)
    weight = torch.tensor([1.2, 3.0]).repeat_interleave(4)
    together, *_ = sample_images(Networks(net), PATH, config, noise, LABEL, slot, weight, no_draw)
    for group, own in ((slice(0, 4), 1.2), (slice(4, 8), 3.0)):
        alone, *_ = sample_images(Networks(net), PATH, config, noise[group], LABEL[group], slot[group], own, no_draw)
        torch.testing.assert_close(together[group], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_sampling_begins_with_noise_of_the_paths_scale(random_inputs, scale):
    (config, noise, slot), seen = setting(0, random_inputs), []
    path = make_path(path_config({"name": "jit", "noise_scale": scale}))
    sampled(lambda x, *others: seen.append(x) or x.sin(), config, noise, LABEL, slot, path)
    assert torch.equal(seen[0], scale * noise)
