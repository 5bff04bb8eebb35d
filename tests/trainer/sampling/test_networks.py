"""Networks that guide, or take the noisiest steps: a plain one has no slots, so it fits where images are alone."""

from pathlib import Path

import pytest
import torch

from trainer.checkpoints.weights import WeightSource, export_weights, find_checkpoint
from trainer.config.tree import change_config, load_config
from trainer.errors import RunError
from trainer.loop import train
from trainer.sampling.samples import make_samples

PLAIN = ["groups.variant=none", "groups.size=1", "groups.share=0", "model.max_group_size=null"]


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """A plain run and one of groups, both of a few large steps."""
    folder, found = tmp_path_factory.mktemp("networks"), {}
    for name, overrides in {"plain": PLAIN, "groups": ["groups.size=4"]}.items():
        short = ["engine=single", "train.images=128", "optim.warmup=0", "optim.lr=0.01", "optim.ema=0"]
        found[name] = load_config(tiny, [f"run={folder / name}", *short, *overrides])
        train(found[name])
    return found


def test_a_plain_network_guides_images_that_are_alone(runs, tmp_path):
    """By its own config, without a sample embedding; in a file, in a network with one, whose rows are zeros."""
    groups, plain = runs["groups"], runs["plain"].run
    export_weights(Path(plain), tmp_path / "plain.safetensors")
    source = WeightSource(find_checkpoint(Path(groups.run)))
    guided = [f"sample.weaker={weaker}" for weaker in (plain, tmp_path / "plain.safetensors")]
    own, file, unguided = (
        torch.from_numpy(make_samples(source, change_config(groups, overrides))[0])
        for overrides in ([guided[0]], [guided[1]], [])
    )
    assert torch.equal(own, file) and not torch.equal(own, unguided)


@pytest.mark.parametrize("change", ["sample.small={run}", "sample.weaker={run} sample.cond_group_size=2"])
def test_but_not_images_in_groups(change, runs):
    config = change_config(runs["groups"], change.format(run=runs["plain"].run).split())
    with pytest.raises(RunError) as caught:
        make_samples(WeightSource(find_checkpoint(Path(runs["groups"].run))), config)
    name = change.partition("=")[0]
    expected = f"{name}={runs['plain'].run}: has model.max_group_size=0, the run 8; give one with as many or more"
    assert str(caught.value) == expected


def test_of_networks_with_a_sample_embedding_one_with_fewer_rows_is_refused(runs, tiny, tmp_path):
    fewer = load_config(tiny, [f"run={tmp_path}/fewer", "engine=single", "train.images=32", "model.max_group_size=4"])
    train(fewer)
    config = change_config(runs["groups"], [f"sample.weaker={fewer.run}"])
    with pytest.raises(RunError, match=r"has model\.max_group_size=4, the run 8; give one with as many or more"):
        make_samples(WeightSource(find_checkpoint(Path(runs["groups"].run))), config)
