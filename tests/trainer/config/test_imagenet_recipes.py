"""Plain configs train as published; Group Diffusion's released form differs from its paper's as the release does."""

from pathlib import Path

import pytest

from trainer.config.parsing import dotted
from trainer.config.tree import load_config

ROOT = Path("configs/imagenet256")


@pytest.mark.parametrize("name", ["dit/dit-xl-2", "sit/sit-xl-2", "../imagenet512/dit-xl-2"])
def test_plain_dit_and_sit_train_as_published(name):
    config = load_config(ROOT / f"{name}.yaml")
    optim = config.optim
    assert (optim.lr, optim.betas, optim.weight_decay, optim.clip) == (1e-4, (0.9, 0.999), 0, None)
    assert (optim.schedule, optim.warmup, optim.ema, config.train.global_batch) == ("constant", 0, (0.9999,), 256)
    assert config.data.flip and config.model.max_group_size == 0


@pytest.mark.parametrize("backbone", ["dit", "sit"])
def test_the_released_form_differs_from_that_of_the_paper_as_the_release_does(backbone):
    paper, released = (
        dotted(load_config(ROOT / f"{backbone}/{backbone}-xl-2-light-4{suffix}.yaml").model_dump())
        for suffix in ("", "-released")
    )
    assert {name: value for name, value in released.items() if value != paper[name]} == {
        "run": f"runs/{backbone}-xl-2-light-4-released",
        "data.latents": "/data/latents-mse",
        "data.vae": "stabilityai/sd-vae-ft-mse",
        "model.max_group_size": 4,
        "groups.threshold": -1,
        "groups.mixing": "within_step",
        "groups.spread": 0,
        "sample.slots": "redrawn",
        "sample.labels": "random",
    }
    assert (paper["model.max_group_size"], paper["groups.spread"], paper["groups.mixing"]) == (16, 0.1, "by_step")
