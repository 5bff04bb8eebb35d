"""The training loop: what a run does, from top to bottom."""

import zlib
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from data.images import open_images
from data.loader import BatchDataset, GroupSampler, load_batches
from data.plan import Plan, steps_per_epoch
from models.objective import denoising_loss
from models.paths import PATHS
from trainer import checkpoint
from trainer.build import build_network, check_data, make_planner
from trainer.config import Config, check_world
from trainer.config_file import to_yaml
from trainer.engines import Engine, build_engine
from trainer.errors import RunError
from trainer.generate import generate, grid, to_uint8
from trainer.monitor import Monitor
from trainer.ranks import from_rank_0, process_group
from trainer.run_folder import check_folder, sole_user, write_config


def train(config: Config, should_stop: Callable[[], bool] = lambda: False) -> Literal["finished", "stopped"]:
    """Train on all ranks of the environment, from the newest checkpoint of the run folder if there is one.

    `should_stop` is asked after every step and must answer the same on all ranks; the run then saves and ends.
    """
    with process_group() as ranks, ExitStack() as closing:
        check_world(config, ranks.world_size)
        from_rank_0(lambda: check_folder(config))
        folder, batch = Path(config.run), config.train.global_batch

        # what to train on, in which order
        images = open_images(config.data.name)
        check_data(config, images)
        plan_of_epoch = make_planner(config, images)
        epoch_steps = steps_per_epoch(len(images), batch)

        # what to train, from where
        engine = build_engine(config, config.optim, build_network(config, images), ranks)
        path = PATHS[config.path]()
        from_rank_0(lambda: closing.enter_context(sole_user(folder)))
        position, notes = _restore(folder / "checkpoints", engine)
        first, last = position // batch, config.train.images // batch
        _check_same_plan(plan_of_epoch(first // epoch_steps))
        if ranks.rank == 0:
            write_config(config)
        monitor = closing.enter_context(Monitor(folder, ranks, position, last * batch))
        for note in notes:
            monitor.say(note)

        def planned(epoch: int) -> Plan:
            monitor.plan(epoch, epoch * epoch_steps * batch, plan_of_epoch(epoch))
            return plan_of_epoch(epoch)

        sampler = GroupSampler(
            planned, epoch_steps, first, last, ranks.rank, ranks.world_size, config.train.micro_batch
        )
        dataset = BatchDataset(images, config.groups, config.model.max_group_size, config.seed)
        images_per_rank = batch // ranks.world_size

        for step, micro_batches in enumerate(load_batches(dataset, sampler, config.data.workers), start=first):
            # forward and backward, micro-batch by micro-batch: the gradient of the mean over the global batch
            step_loss = torch.zeros((), device=ranks.device)
            for i, micro in enumerate(micro_batches):
                with engine.accumulating(last=i == len(micro_batches) - 1):
                    loss = denoising_loss(engine, path, micro.to(ranks.device)).sum() / images_per_rank
                    engine.backward(loss)
                step_loss += loss.detach()

            # update
            before, position = position, (step + 1) * batch
            lr = config.optim.lr_at(position)
            grad_norm = engine.step(lr)
            grouped = sum(len(m.t) for m in micro_batches if m.grouped) / images_per_rank
            monitor.note(step, position, step_loss, grad_norm, lr, grouped)

            # now and then: log, show samples, save
            stopping = should_stop()
            saving = stopping or step + 1 == last or _passed(config.checkpoint.every, before, position)
            if saving or _passed(config.train.log_every, before, position):
                monitor.flush()  # raises if a loss is not finite, so that no such state is saved
            if config.train.sample_every and _passed(config.train.sample_every, before, position):
                with engine.ema_weights():
                    samples = generate(engine, config, images, ranks)
                monitor.picture("samples", grid(to_uint8(samples), config.sample.group_size, enlarge=4), position)
            if saving:
                checkpoint.save(folder / "checkpoints", position, engine.state(), to_yaml(config))
                if ranks.rank == 0:
                    checkpoint.prune(folder / "checkpoints", config.checkpoint)
            if stopping:
                break

        return "finished" if position >= last * batch else "stopped"


def _passed(every: int, before: int, position: int) -> bool:
    """Whether a multiple of `every` images lies in (before, position]."""
    return position // every > before // every


def _restore(folder: Path, engine: Engine) -> tuple[int, list[str]]:
    """Load the newest complete checkpoint into the engine. Returns its position (0: none) and what there is to say."""

    def choose() -> tuple[Path | None, list[str]]:
        complete, incomplete = checkpoint.find(folder)
        for path in incomplete:
            checkpoint.remove(path)
        if complete:
            checkpoint.verify(complete[-1])
        notes = [f"{path}: incomplete, left by a killed run; removed" for path in incomplete]
        return (complete[-1] if complete else None), notes

    newest, notes = from_rank_0(choose)
    if newest is None:
        return 0, notes
    state = engine.state()
    position = checkpoint.load(newest, state)
    engine.load_state(state)
    return position, [*notes, f"continuing from {newest}"]


def _check_same_plan(plan: Plan) -> None:
    """RunError unless all ranks have made the same plan (another library version on one node would do it)."""
    mine = zlib.crc32(plan.images.tobytes() + plan.grouped.tobytes())
    lowest = torch.tensor([mine, -mine])
    dist.all_reduce(lowest, dist.ReduceOp.MIN)
    if lowest[0] != -lowest[1]:
        raise RunError("the ranks have made different plans: give all nodes the same data and package versions")
