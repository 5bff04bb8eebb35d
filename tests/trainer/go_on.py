"""One rank that goes on from the runs of other engines."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from unittest.mock import Mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from models.objectives.denoising import denoising_loss
from models.paths.registry import make_path
from tests.trainer.forked import TINY
from trainer.batches import make_batches
from trainer.build import build_network, open_data
from trainer.checkpoints import folder as checkpoint
from trainer.config.tree import load_config
from trainer.engines.base import Engine
from trainer.engines.build import build_engine
from trainer.engines.schedules import lr_at
from trainer.ranks import process_group


@cache
def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Read without the ranks."""
    index = checkpoint.Reader(folder).read_metadata().state_dict_metadata
    state = {k: torch.empty(m.size) for k, m in index.items() if isinstance(m, TensorStorageMetadata)}
    torch.distributed.checkpoint.load(state, storage_reader=checkpoint.Reader(folder), no_dist=True)
    return state


def flat(tree: dict, prefix: str = "") -> dict[str, torch.Tensor]:
    """By the names in a checkpoint."""
    found = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def differs(tensor: torch.Tensor, expected: torch.Tensor) -> bool:
    """What this rank has of it."""
    if isinstance(tensor, DTensor):
        [chunk] = tensor.__create_chunk_list__()
        for dimension, (start, length) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
            expected = expected.narrow(dimension, start, length)
        tensor = tensor.to_local()
    return not torch.equal(tensor, expected)


def outputs(network: Callable[..., torch.Tensor]) -> torch.Tensor:
    """For inputs that all ranks have."""
    number = torch.arange(4)
    with torch.no_grad():
        return network(torch.linspace(-1, 1, 256).view(4, 1, 8, 8), number / 4, number, number, 2)


def output_errors(engine: Engine, network: nn.Module, expected: dict[str, torch.Tensor]) -> list[float]:
    """How far the engine's outputs are from those of a network with the stored averages, weights, averages."""
    errors = []
    for part in ("ema", "model", "ema"):
        network.load_state_dict(
            {k.removeprefix(f"{part}."): v for k, v in expected.items() if k.startswith(f"{part}.")}
        )
        with engine.ema_weights() if part == "ema" else nullcontext():
            errors.append((outputs(engine) - outputs(network)).abs().max().item())
    return errors


def go_on(*overrides: str) -> None:
    """Where the overrides have run=FOLDER, for each FOLDER/../from-*: its newest checkpoint is loaded, compared with
    what is stored, and three steps are made. Rank 0 writes what came of it to FOLDER.json:
    {from: {"errors": [of outputs], "losses": [...]}}."""
    config = load_config(TINY, overrides)
    images, batch, results = open_data(config), config.train.global_batch, {}
    with process_group() as ranks:
        engine = build_engine(config, config.optim, build_network(config, images), ranks)
        for source in sorted(Path(config.run).parent.glob("from-*")):
            newest = checkpoint.find(source / "checkpoints")[0][-1]
            state = engine.state()
            first = checkpoint.load(newest, state) // batch
            engine.load_state(state, first)
            found, expected = flat(engine.state()), stored(newest)
            assert found.keys() == expected.keys(), source
            assert [key for key in expected if differs(found[key], expected[key])] == [], source
            errors, losses = output_errors(engine, build_network(config, images), expected), []
            for micro_batches in make_batches(config, images, ranks, first, first + 3, Mock()):
                loss = torch.zeros(())
                for i, micro in enumerate(micro_batches):
                    with engine.accumulating(last=i == len(micro_batches) - 1):
                        loss_of_images = denoising_loss(engine, make_path(config.path), micro)
                        part = loss_of_images.sum() * ranks.world_size / batch
                        engine.backward(part)
                        loss += part.detach()
                engine.step(lr_at(config.optim, batch * (first + len(losses) + 1), config.train.images))
                dist.all_reduce(loss)
                losses.append(loss.item() / ranks.world_size)
            results[source.name] = {"errors": errors, "losses": losses}
        if ranks.rank == 0:
            Path(config.run + ".json").write_text(json.dumps(results))
