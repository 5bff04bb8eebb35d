import pytest
import torch

from models.generation import SampleConfig, sample_images
from models.paths import LinearFlow

SEEDS = range(3)
LABEL = torch.tensor([3, 3, 3, 3, 1, 1, 1, 1])
PATH = LinearFlow()


@pytest.mark.parametrize(
    ("variant", "size", "c", "uc"),
    [("none", 1, 1, 1), ("light", 4, 1, 4), ("full", 4, 4, 4), ("light", 1, 1, 1), ("light", 16, 1, 16)],
)
def test_the_variant_gives_c_and_uc(variant, size, c, uc):
    config = SampleConfig().for_variant(variant, size)
    assert (config.cond_group_size, config.uncond_group_size) == (c, uc)
    assert config.group_size == max(c, uc)


def test_group_sizes_that_are_given_stay_and_so_does_all_else():
    given = SampleConfig(cond_group_size=2, uncond_group_size=8, steps=7, guidance=3, interval=(-1, 2), seed=5)
    for variant in ("none", "light", "full"):
        assert given.for_variant(variant, 1) == given
    config = SampleConfig(uncond_group_size=8, steps=7).for_variant("full", 4)
    assert (config.cond_group_size, config.uncond_group_size, config.group_size, config.steps) == (4, 8, 8, 7)
    assert config.for_variant("none", 1) == config


@pytest.mark.parametrize(("c", "uc"), [(2, 3), (4, 6), (6, 4)])
def test_group_sizes_of_which_none_divides_the_other_are_an_error(c, uc):
    with pytest.raises(ValueError, match=f"cond_group_size={c}.*divide"):
        SampleConfig(cond_group_size=c, uncond_group_size=uc).for_variant("full", 4)
    with pytest.raises(ValueError, match="divide"):
        SampleConfig(uncond_group_size=uc).for_variant("full", c)


def test_an_interval_upside_down_is_an_error():
    with pytest.raises(ValueError, match=r"interval=\[2.0, -1.0\]"):
        SampleConfig(interval=(2, -1)).for_variant("light", 4)
    assert SampleConfig(interval=(1, 1)).for_variant("light", 4).interval == (1, 1)


@pytest.mark.parametrize("values", [{"sampler": "dopri"}, {"steps": 0}, {"guidance": -1}, {"cond_group_size": 0}])
def test_an_impossible_setting_is_an_error_that_names_it(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        SampleConfig(**values)


def setting(seed, random_inputs):
    noise, _, _, slot = random_inputs(seed, 8, 4)
    config = SampleConfig(steps=3, guidance=1.8, interval=(-3, 3)).for_variant("light", 4)
    return config, noise, slot


@pytest.mark.parametrize("seed", SEEDS)
def test_permuting_the_images_of_a_group_permutes_the_samples(random_dit, random_inputs, shuffled_groups, seed):
    net, (config, noise, slot) = random_dit(seed), setting(seed, random_inputs)
    order = shuffled_groups(seed, 8, 4)
    samples = sample_images(net, PATH, config, noise, LABEL, slot)
    moved = sample_images(net, PATH, config, noise[order], LABEL[order], slot[order])
    torch.testing.assert_close(moved, samples[order], rtol=0, atol=1e-5)
    assert samples.shape == noise.shape
    assert not samples.requires_grad


@pytest.mark.parametrize("seed", SEEDS)
def test_the_samples_of_a_group_depend_on_it_alone(random_dit, random_inputs, seed):
    net, (config, noise, slot) = random_dit(seed), setting(seed, random_inputs)
    samples = sample_images(net, PATH, config, noise, LABEL, slot)
    for group in (slice(0, 4), slice(4, 8)):
        alone = sample_images(net, PATH, config, noise[group], LABEL[group], slot[group])
        torch.testing.assert_close(alone, samples[group], rtol=0, atol=1e-5)
    apart = sample_images(net, PATH, config.for_variant("none", 1), noise, LABEL, slot)
    torch.testing.assert_close(apart, samples)  # C and UC are already given
    single = config.model_copy(update={"uncond_group_size": 1})
    assert (sample_images(net, PATH, single, noise, LABEL, slot) - samples).abs().flatten(1).amax(1).min() > 1e-4


@pytest.mark.parametrize("seed", SEEDS)
def test_sampler_steps_and_guidance_of_the_configuration_are_those_used(random_dit, random_inputs, seed):
    """One Euler step from t = 0: noise + u + w (c - u)."""
    net, (_, noise, slot) = random_dit(seed), setting(seed, random_inputs)
    zero, null = torch.zeros(8), torch.full((8,), -1)
    c, u = (net(noise, zero, label, slot, n) for label, n in ((LABEL, 1), (null, 4)))
    config = SampleConfig(sampler="euler", steps=1, guidance=1.8).for_variant("light", 4)
    samples = sample_images(net, PATH, config, noise, LABEL, slot)
    torch.testing.assert_close(samples, noise + u + 1.8 * (c - u), rtol=0, atol=1e-5)
    outside = config.model_copy(update={"interval": (-3.0, 3.0)})  # t = 0 is log-SNR -inf
    samples = sample_images(net, PATH, outside, noise, LABEL, slot)
    torch.testing.assert_close(samples, noise + c, rtol=0, atol=1e-5)
