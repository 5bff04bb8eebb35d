"""The training loop: what a run does, from top to bottom."""

from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import torch

from data.sets.form import form_of
from models.paths.registry import make_path
from trainer.batches import make_batches
from trainer.build import build_network, build_objective, initial_network, open_data
from trainer.checkpoints.folder import CHECKPOINTS, SNAPSHOTS, find
from trainer.checkpoints.saver import Saver
from trainer.config.parsing import to_yaml
from trainer.config.tree import Config, check_world
from trainer.engines.build import build_engine
from trainer.engines.ema import power_averages
from trainer.engines.schedules import lr_at
from trainer.engines.stop_vote import StopVote
from trainer.monitor import Monitor
from trainer.periodic import Periodic, has_passed
from trainer.ranks import from_rank_0, process_group
from trainer.restore import restore
from trainer.run_folder import check_folder, sole_user, write_config


def train(config: Config, stop_requested: Callable[[], bool] = lambda: False) -> Literal["finished", "stopped"]:
    """Train on all ranks of the environment, resuming from the run folder's newest checkpoint if there is one.

    `stop_requested` is called at every step; if it is true on any rank, the run saves after that step and ends.
    """
    with process_group(config.train.timeout) as ranks, ExitStack() as closing:
        check_world(config, ranks.world_size)
        config = from_rank_0(lambda: check_folder(config))
        folder, batch = Path(config.run), config.train.global_batch

        # what to train on
        images = open_data(config)
        form = form_of(images)
        periodic = Periodic(config, images, ranks)

        # what to train, from where
        from_rank_0(lambda: closing.enter_context(sole_user(folder)))
        started = from_rank_0(lambda: bool(find(folder / CHECKPOINTS)[0]))
        network = build_network(config, form) if started else initial_network(config, form)
        objective = build_objective(config, network, images)
        engine = build_engine(config, config.optim, network, ranks, objective.heads)
        path = make_path(config.path)
        position, notes = restore(folder / CHECKPOINTS, engine, images, batch, config.resume.fallback)
        first, last = position // batch, config.train.images // batch
        if ranks.rank == 0:
            write_config(config)
        monitor = closing.enter_context(Monitor(folder, config.train.sinks, ranks, first, position, last * batch))
        for note in notes:
            monitor.say(note)
        batches = make_batches(config, images, ranks, first, last, monitor.plan, objective.extra)
        images_per_rank = batch // ranks.world_size
        periodic.catch_up(engine, batch, position, monitor)

        saver = closing.enter_context(Saver(folder, config.checkpoint, config.train.timeout))
        vote = StopVote(lambda: stop_requested() or saver.failed(), config.train.timeout)
        for step, micro_batches in enumerate(batches, start=first):
            vote.begin()

            # forward and backward, micro-batch by micro-batch: the gradient of the mean over the global batch
            step_losses = defaultdict(lambda: torch.zeros((), device=ranks.device))
            for i, micro in enumerate(micro_batches):
                with engine.accumulating(last=i == len(micro_batches) - 1):
                    losses = objective(engine, path, micro.to(ranks.device), engine.autocast)
                    losses = {name: loss.sum() / images_per_rank for name, loss in losses.items()}
                    engine.backward(losses["loss"])
                for name, loss in losses.items():
                    step_losses[name] += loss.detach()

            # update
            saver.wait_for_copy()
            before, position = position, (step + 1) * batch
            lr = lr_at(config.optim, position, config.train.images)
            grad_norm = engine.step(lr)
            grouped = sum(len(m.u) for m in micro_batches if m.in_groups) / images_per_rank
            fallbacks = sum(m.fallbacks for m in micro_batches)
            monitor.note(step, position, step_losses, grad_norm, lr, grouped, fallbacks)

            # now and then: log, save, sample and evaluate
            stopping = vote.decided()
            ending, keep = step + 1 == last, config.checkpoint
            saving = stopping or ending or has_passed(keep.every, before, position)
            snapping = keep.snapshot_every and (ending or has_passed(keep.snapshot_every, before, position))
            if saving or snapping or has_passed(config.train.log_every, before, position):
                monitor.flush()  # raises if a loss is not finite, so that such a state is never saved
            if saving or snapping:
                state = engine.state()
                states = {SNAPSHOTS: power_averages(state)} if snapping else {}  # first: a run that resumes from
                states |= {CHECKPOINTS: state} if saving else {}  # a checkpoint does not redo what follows it
                metrics = {"loss": monitor.loss_since_last_save()} if saving else {}
                saver.save(position, states, to_yaml(config), form, metrics)
                del state, states  # with some engines, they are copies
            if stopping:
                break
            if periodic.due(before, position):
                saver.wait_for_copy()  # because the averages are about to replace the weights
                periodic.run(engine, path, before, position, micro_batches, monitor)

        saver.wait()
        return "finished" if position >= last * batch else "stopped"
