"""Report the losses of each step, summed over the ranks, to sinks; stop at a loss that is not finite."""

import math
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from data.batches.plan import Plan
from trainer.errors import RunError, add_facts
from trainer.ranks import Ranks
from trainer.sinks import SINKS, has_evaluation


class Monitor:
    """Notes steps without waiting for the device; `flush` sums over the ranks and reports. Each rank has one and calls
    `note` and `flush` like the others; only rank 0's has sinks."""

    def __init__(
        self, folder: Path, sinks: Iterable[str], ranks: Ranks, first_step: int, position: int, images: int
    ) -> None:
        self._folder, self._world_size, self.writes = folder, ranks.world_size, ranks.rank == 0
        self._steps: list[dict[str, float]] = []
        self._losses: list[dict[str, Tensor]] = []
        self._norms: list[Tensor] = []
        self._fallbacks: list[int] = []
        self._flushed = (time.perf_counter(), position)
        self._next_step = first_step
        self._unsaved: list[float] = []
        self._sinks = [SINKS[name](folder, position, images) for name in sinks] if self.writes else []

    def note(
        self,
        step: int,
        position: int,
        losses: dict[str, Tensor],
        grad_norm: Tensor,
        lr: float,
        grouped: float,
        fallbacks: int,
    ) -> None:
        """Note one step: its number, the images seen after it, this rank's mean losses (`loss` and its parts), the
        share of images in groups, and how many of this rank's groups the query could not fill."""
        self._next_step = step + 1
        self._losses.append(losses)
        self._norms.append(grad_norm)
        self._fallbacks.append(fallbacks)
        self._steps.append({"step": step, "position": position, "lr": lr, "grouped": grouped})

    def flush(self) -> None:
        """Report all noted steps. Raise RunError, on all ranks, at the first loss or gradient that is not finite."""
        if not self._steps:
            return
        names = list(self._losses[0])  # `loss` first
        losses = torch.stack([torch.stack([losses[name] for losses in self._losses]) for name in names])
        fallbacks = torch.tensor(self._fallbacks, dtype=losses.dtype, device=losses.device)
        sums = torch.cat([losses, fallbacks[None]])
        dist.all_reduce(sums)
        means, fallbacks = (sums[:-1] / self._world_size).tolist(), sums[-1].int().tolist()
        norms = torch.stack(self._norms).tolist()
        self._unsaved += means[0]
        rows = [
            {**step, "loss": loss, "grad_norm": norm, "fallbacks": fallback, **dict(zip(names[1:], parts, strict=True))}
            for step, norm, fallback, loss, *parts in zip(self._steps, norms, fallbacks, *means, strict=True)
        ]
        self._steps, self._losses, self._norms, self._fallbacks = [], [], [], []
        bad = next((r for r in rows if not (math.isfinite(r["loss"]) and math.isfinite(r["grad_norm"]))), None)
        self._report(rows[: rows.index(bad)] if bad else rows)
        if bad:
            raise RunError(
                f"step {bad['step']}: loss={bad['loss']}, grad_norm={bad['grad_norm']}: not finite; training stops, the"
                " checkpoints before it stay; lower optim.lr"
            )

    def loss_since_last_save(self) -> float:
        """Return the mean loss over the steps flushed since the last call."""
        mean = sum(self._unsaved) / len(self._unsaved)
        self._unsaved = []
        return mean

    def _report(self, rows: list[dict[str, float]]) -> None:
        if not rows:
            return
        position, now = int(rows[-1]["position"]), time.perf_counter()
        rate = (position - self._flushed[1]) / (now - self._flushed[0])
        self._flushed = (now, position)
        names = [name for name in rows[0] if name not in ("step", "position")]
        means = {f"train/{name}": sum(row[name] for row in rows) / len(rows) for name in names}
        for sink in self._sinks:
            sink.rows(rows)
            sink.scalars({**means, "train/images_per_second": rate}, position)

    def plan(self, epoch: int, position: int, plan: Plan) -> None:
        """Report how many groups of an epoch the query could not fill."""
        if self.writes and len(plan.fallback):
            share = float(plan.fallback.mean())
            self.scalar("plan/fallback_share", share, position)
            if share:
                self.say(f"epoch {epoch}: {plan.fallback.sum()} of {len(plan.fallback)} groups are fallbacks")

    def picture(self, name: str, picture: np.ndarray, position: int) -> None:
        """Report an image (height, width, channels) uint8."""
        for sink in self._sinks:
            sink.picture(name, picture, position)

    def scalar(self, name: str, value: float, position: int) -> None:
        """Report a number."""
        for sink in self._sinks:
            sink.scalars({name: value}, position)

    def evaluation(self, record: dict, position: int) -> None:
        """Report the metrics of samples, with the rest of their record."""
        numbers = {f"evaluate/{name}": value for name, value in record.items() if isinstance(value, float)}
        for sink in self._sinks:
            sink.evaluation({"position": position, **record})
            sink.scalars(numbers, position)

    def has_evaluation(self, position: int) -> bool:
        """Return whether the run has an evaluation at this position."""
        return has_evaluation(self._folder, position)

    def say(self, message: str) -> None:
        """Write a line to stderr, above the progress bar if there is one."""
        if self.writes:
            tqdm.write(message, sys.stderr)
        for sink in self._sinks:
            sink.text(message)

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, _: type | None, error: BaseException | None, __: object) -> None:
        if error is not None:
            add_facts(error, step=self._next_step)
            error.add_note(f"in step {self._next_step}")
        for sink in self._sinks:
            sink.close()
