import pytest
import torch
from torch import nn

from data.sets.registry import DataConfig, open_images
from tests.trainer.forked import train_tiny
from trainer.build import build_network
from trainer.checkpoints.weights import WeightSource, find_checkpoint
from trainer.config.tree import load_config
from trainer.engines.ema import EMA
from trainer.ranks import Ranks
from trainer.sampling.generate import generate
from trainer.sampling.networks import Networks
from trainer.sampling.pictures import to_uint8
from trainer.sampling.samples import make_samples


@pytest.mark.parametrize("seed", range(3))
def test_ema_equals_the_closed_form(seed):
    torch.manual_seed(seed)
    decay, steps = 0.9, 17
    layer = nn.Linear(5, 3)
    ema = EMA(dict(layer.named_parameters()), lambda step: decay)
    history = [layer.weight.detach().double().clone()]
    for step in range(steps):
        with torch.no_grad():
            layer.weight.add_(torch.randn(3, 5))
        ema.update(step + 1)
        history.append(layer.weight.detach().double().clone())
    expected = decay**steps * history[0]
    expected += sum((1 - decay) * decay ** (steps - k) * history[k] for k in range(1, steps + 1))
    assert torch.allclose(ema.average["weight"].double(), expected, atol=1e-6)


def test_the_ema_of_a_sharded_run_equals_the_closed_form_of_its_weights(ranks, tensors, tmp_path):
    """With shards that do not divide evenly: the label table has 11 rows."""
    run = tmp_path / "run"
    overrides = ["checkpoint.every=32", "model.width=36", "model.heads=3", "train.images=320"]
    ranks.run(2, train_tiny, f"run={run}", *overrides)
    checkpoints = [tensors(path) for path in sorted((run / "checkpoints").iterdir())]
    first = checkpoints[0]
    for name in (name for name in first if name.startswith("ema.")):
        average = first[name].double()
        for state in checkpoints[1:]:
            average = 0.9 * average + 0.1 * state[name.replace("ema.", "model.")].double()
        assert torch.allclose(checkpoints[-1][name].double(), average, atol=1e-6), name


def test_samples_come_from_the_ema_weights(ranks, tensors, tmp_path):
    """The EMA in the checkpoint is far from the weights: samples of either must be those of a network that holds it."""
    run = tmp_path / "run"
    ranks.run(1, train_tiny, f"run={run}", "optim.lr=1e-2", "optim.warmup=0", "optim.ema=0.99")
    config = load_config(run / "config.yaml")
    checkpoint = find_checkpoint(run)
    pixels, _, record = make_samples(WeightSource(checkpoint), config)
    raw, _, raw_record = make_samples(WeightSource(checkpoint, raw=True), config)
    assert record["weights"] == "ema" and raw_record["weights"] == "model"
    assert (pixels != raw).mean() > 0.1

    images = open_images(DataConfig())
    network = build_network(config, images)
    ema = {n.removeprefix("ema."): v for n, v in tensors(checkpoint).items() if n.startswith("ema.")}
    network.load_state_dict(ema)
    expected = to_uint8(generate(Networks(network), config, images, Ranks(0, 1, torch.device("cpu")))[0])
    assert (pixels == expected).all()
