"""One rank that trains with heads and with two groups of parameters, saves, and resumes what other engines saved."""

import json
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from data.sets.form import form_of
from models.objectives.denoising import denoising_loss
from models.paths.registry import make_path
from tests.trainer.forked import TINY
from tests.trainer.go_on import differs, flat, stored
from trainer.batches import make_batches
from trainer.build import build_network, open_data
from trainer.checkpoints import folder as checkpoint
from trainer.config.tree import load_config
from trainer.engines.build import build_engine
from trainer.engines.schedules import lr_at
from trainer.ranks import process_group

STEPS = 3


def make_heads(width):
    """`all` is called in every micro-batch, `groups` in those of groups; first dimensions that no two ranks divide."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.ModuleDict(
            {"all": nn.Sequential(nn.Linear(width, 7), nn.SiLU(), nn.Linear(7, 1)), "groups": nn.Linear(width, 3)}
        )


class Training:
    """A run by hand: an engine with heads that look at what the first block returns."""

    def __init__(self, config, ranks):
        self.config, self.ranks, self.images = config, ranks, open_data(config)
        network, self.heads = build_network(config, self.images), make_heads(config.model.width)
        network.get_submodule("blocks.0").register_forward_hook(self._keep)
        self.engine = build_engine(config, config.optim, network, ranks, self.heads)

    def _keep(self, block, inputs, output):
        self.hidden = output

    def loss(self, micro):
        """Of each image: the denoising loss, and how far the heads are from the mean of the image."""
        loss, mean = denoising_loss(self.engine, make_path(self.config.path), micro), micro.x.mean((1, 2, 3))
        with self.engine.autocast():
            loss = loss + (self.heads["all"](self.hidden).float().mean((1, 2)) - mean).square()
            if micro.group_size > 1:
                loss = loss + (self.heads["groups"](self.hidden).float().mean((1, 2)) - mean).square()
        return loss

    def steps(self, first, count=STEPS):
        """[loss, gradient norm] of each step."""
        config, engine, rows = self.config, self.engine, []
        batch = config.train.global_batch
        for micro_batches in make_batches(config, self.images, self.ranks, first, first + count, lambda *_: None):
            total = torch.zeros(())
            for i, micro in enumerate(micro_batches):
                with engine.accumulating(last=i == len(micro_batches) - 1):
                    loss = self.loss(micro).sum() * self.ranks.world_size / batch
                    engine.backward(loss)
                total += loss.detach() / self.ranks.world_size
            norm = engine.step(lr_at(config.optim, batch * (first + len(rows) + 1), config.train.images))
            dist.all_reduce(total)
            rows.append([total.item(), norm.item()])
        return rows

    def save(self, folder):
        checkpoint.save(folder, STEPS * self.config.train.global_batch, self.engine.state(), "", form_of(self.images))


def begin(*overrides):
    """Three steps and a checkpoint, then three more, noted in FOLDER.json; the checkpoint is compared with itself."""
    config = load_config(TINY, overrides)
    with process_group() as ranks:
        run = Training(config, ranks)
        rows = run.steps(0)
        run.save(Path(config.run) / "checkpoints")
        rows += run.steps(STEPS)
        if ranks.rank == 0:
            Path(config.run + ".json").write_text(json.dumps(rows))


def resume(*overrides):
    """From each FOLDER/../from-*: the losses of three steps, noted in FOLDER.json, after a comparison with what is
    stored."""
    config, results = load_config(TINY, overrides), {}
    with process_group() as ranks:
        run = Training(config, ranks)
        for source in sorted(path for path in Path(config.run).parent.glob("from-*") if path.is_dir()):
            [newest] = checkpoint.find(source / "checkpoints")[0]
            state = run.engine.state()
            checkpoint.load(newest, state)
            run.engine.load_state(state, STEPS)
            found, expected = flat(run.engine.state()), stored(newest)
            assert found.keys() == expected.keys(), source
            assert [key for key in expected if differs(found[key], expected[key])] == [], source
            results[source.name] = run.steps(STEPS)
        if ranks.rank == 0:
            Path(config.run + ".json").write_text(json.dumps(results))
