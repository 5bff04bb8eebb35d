"""The configs for ImageNet: networks have the published sizes, a variant differs from its base in groups alone."""

from pathlib import Path

import pytest
import torch

from models.backbones.flops import forward_multiply_adds
from models.backbones.registry import make_network
from models.paths.registry import make_path
from models.sampling.guidance import inside
from trainer.config.parsing import dotted
from trainer.config.tree import load_config

ROOT = Path("configs")
VARIANTS = {"light-4": (1, 4), "light-8": (1, 8), "light-16": (1, 16), "full-4": (4, 4)}  # C and UC
RELEASE = {  # Group Diffusion's training, where DiT's and SiT's is another
    "train.images": 800 * 1_281_167,
    "optim.betas": (0.9, 0.95),
    "optim.weight_decay": 0.01,
    "optim.decay": "matrices",
    "optim.clip": 3.0,
}
OWN = {  # of Group Diffusion on a backbone, whatever the groups
    "dit-xl-2": RELEASE | {"sample.guidance": (1.65,), "sample.guided_channels": None},
    "sit-xl-2": RELEASE | {"sample.guidance": (2.585,), "sample.interval": (-2.1973, 2.1973)},
}
RUNS = sorted(path for path in ROOT.glob("imagenet*/**/*.yaml") if path.parent.name != "groups")
BACKBONES = ["dit-xl-2", "sit-xl-2", "jit-b-16", "jit-l-16"]
# (millions of parameters, 10^9 multiply-adds of a forward pass) of DiT (arXiv 2212.09748, table 4) and JiT (2511.13720,
# table 5)
PUBLISHED = {
    "imagenet256/dit/dit-xl-2": (675, 118.64),
    "imagenet256/sit/sit-xl-2": (675, 118.64),
    "imagenet256/jit/jit-b-16": (131, 25),
    "imagenet256/jit/jit-l-16": (459, 88),
    "imagenet256/jit/jit-h-16": (953, 182),
    "imagenet512/dit-xl-2": (675, 524.6),
    "imagenet512/jit-b-32": (133, 26),
    "imagenet512/jit-l-32": (462, 89),
    "imagenet512/jit-h-32": (956, 183),
}


def network_of(config):
    with torch.device("meta"):
        channels, side = config.data.channels, config.data.side
        return make_network(config.model, channels, side, 1000, config.path.predictions * channels)


@pytest.mark.parametrize("name", PUBLISHED)
def test_networks_have_the_published_parameters_and_multiply_adds(name):
    config = load_config(ROOT / f"{name}.yaml")
    millions, giga = PUBLISHED[name]
    net = network_of(config)
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, abs=0.8)
    counted = forward_multiply_adds(net, 1, config.data.channels, config.data.side, 1) / 1e9
    assert counted == pytest.approx(giga, rel=0.005 if "jit" not in name else 0.03)


@pytest.mark.parametrize("size", ["S", "B", "L"])
def test_smaller_dit_have_the_published_multiply_adds(size):
    config = load_config(ROOT / "imagenet256/dit/dit-xl-2.yaml", [f"model.size={size}"])
    counted = forward_multiply_adds(network_of(config), 1, 4, 32, 1)
    assert counted == pytest.approx({"S": 6.06e9, "B": 23.01e9, "L": 80.71e9}[size], rel=0.005)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_is_its_base_with_groups(backbone, variant):
    path = ROOT / f"imagenet256/{backbone[:3]}/{backbone}-{variant}.yaml"
    assert len(path.read_text().splitlines()) <= 3
    plain, config = load_config(ROOT / f"imagenet256/{backbone[:3]}/{backbone}.yaml"), load_config(path)
    before, after = dotted(plain.model_dump()), dotted(config.model_dump())
    changed = {name for name in after if after[name] != before[name]} - {"run"}
    own = OWN.get(backbone, {})
    assert {name: after[name] for name in own} == own and own.keys() <= changed
    assert all(
        name.startswith(("groups.", "model.max_group_size", "sample.uncond_group", "sample.cond_group"))
        for name in changed - own.keys()
    )
    assert (config.sample.cond_group_size, config.sample.uncond_group_size) == VARIANTS[variant]
    assert config.groups.size == int(variant.rpartition("-")[2])
    assert network_of(config).sample_embedder.embedding_table.weight.shape[0] >= config.groups.size


def test_every_config_builds_on_the_meta_device():
    built = 0
    for path in RUNS:
        config = load_config(path)
        assert all(p.is_meta for p in network_of(config).parameters())
        built += 1
    assert built >= len(PUBLISHED) + len(BACKBONES) * len(VARIANTS)


@pytest.mark.parametrize(
    ("name", "ends"),
    {
        **{f"imagenet256/sit/sit-xl-2-{variant}": (0.25, 0.75) for variant in VARIANTS},
        **{f"imagenet256/jit/jit-{size}-16": (0.1, None) for size in "blh"},
        **{f"imagenet512/jit-{size}-32": (0.1, None) for size in "blh"},
    }.items(),
)
def test_guidance_acts_between_the_published_times(name, ends):
    config = load_config(ROOT / f"{name}.yaml")
    path = make_path(config.path)
    for found, time in zip(config.sample.interval, ends, strict=True):
        expected = time if time is None else float(path.log_snr(torch.tensor(time, dtype=torch.float64)))
        assert found == (None if time is None else pytest.approx(expected, abs=1e-4))


@pytest.mark.parametrize(
    ("name", "epochs"),
    {"dit-xl-2": 1400, "sit-xl-2": 1400, "jit-b-16": 600, "dit-xl-2-light-4": 800, "sit-xl-2-full-4": 800}.items(),
)
def test_runs_are_as_long_as_the_published_ones(name, epochs):
    assert load_config(ROOT / f"imagenet256/{name[:3]}/{name}.yaml").train.images == epochs * 1_281_167


@pytest.mark.parametrize(
    ("size", "dropout", "guidance", "at_512"), [("b", 0, 3.0, 3.0), ("l", 0, 2.4, 2.5), ("h", 0.2, 2.2, 2.3)]
)
def test_jit_is_trained_and_sampled_as_published(size, dropout, guidance, at_512):
    """Table 9 of arXiv 2511.13720; the weights of guidance are those of the public code's README."""
    small = load_config(ROOT / f"imagenet256/jit/jit-{size}-16.yaml")
    large = load_config(ROOT / f"imagenet512/jit-{size}-32.yaml")
    for config, weight, patch in ((small, guidance, 16), (large, at_512, 32)):
        optim, sample, batch = config.optim, config.sample, config.train.global_batch
        assert (optim.lr, optim.betas, optim.weight_decay, optim.clip) == (5e-5 * batch / 256, (0.9, 0.95), 0, None)
        assert (batch, optim.warmup, optim.schedule, optim.ema) == (1024, 5 * 1_281_167, "constant", (0.9999, 0.9996))
        assert (config.model.dropout, config.model.patch, config.data.side) == (dropout, patch, 16 * patch)
        assert (sample.sampler, sample.steps, sample.guidance) == ("heun", 50, (weight,))
        path = make_path(config.path)
        assert (path.config.noise_scale, path.config.logit_mean, path.config.logit_std) == (patch / 16, -0.8, 0.8)
        times = torch.tensor(path.even_times(50), dtype=torch.float64)
        guided = [time for time in times.tolist() if inside(float(path.log_snr(torch.tensor(time))), sample.interval)]
        assert guided[0] == pytest.approx(0.12) and len(guided) == 45  # the public code: t > 0.1


def test_no_two_configs_share_a_run_folder():
    runs = [load_config(path).run for path in RUNS]
    assert len(set(runs)) == len(runs)
