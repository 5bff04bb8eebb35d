"""What a run tells: metrics.jsonl (every step), measures.jsonl, TensorBoard, a progress bar, and that a loss is not
finite."""

import json
import math
import sys
import time
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from data.batches.plan import Plan
from trainer.errors import RunError, add_facts
from trainer.ranks import Ranks
from trainer.run_folder import sync


class Monitor:
    """Notes steps without waiting for the device; `flush` sums and writes them. All ranks have one; rank 0 writes."""

    def __init__(self, folder: Path, ranks: Ranks, first_step: int, position: int, images: int) -> None:
        self._world_size, self.writes = ranks.world_size, ranks.rank == 0
        self._steps: list[dict[str, float]] = []
        self._losses: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._fallbacks: list[int] = []
        self._flushed = (time.perf_counter(), position)
        self._next_step = first_step
        self._unsaved: list[float] = []
        if self.writes:
            self._metrics = _continue_rows(folder / "metrics.jsonl", position)
            self._measures = _continue_rows(folder / "measures.jsonl", position)
            self._board = SummaryWriter(str(folder), purge_step=position + 1)
            self._bar = tqdm(total=images, initial=position, unit="img", unit_scale=True, desc="train", mininterval=0.5)

    def note(
        self, step: int, position: int, loss: Tensor, grad_norm: Tensor, lr: float, grouped: float, fallbacks: int
    ) -> None:
        """One step: its number, the images seen after it, this rank's mean loss, the share of grouped images, and how
        many of this rank's groups the query could not fill."""
        self._next_step = step + 1
        self._losses.append(loss)
        self._norms.append(grad_norm)
        self._fallbacks.append(fallbacks)
        self._steps.append({"step": step, "position": position, "lr": lr, "grouped": grouped})

    def flush(self) -> None:
        """Write all noted steps. RunError, on all ranks, at the first loss or gradient that is not finite."""
        if not self._steps:
            return
        losses = torch.stack(self._losses)
        sums = torch.stack([losses, torch.tensor(self._fallbacks, dtype=losses.dtype, device=losses.device)])
        dist.all_reduce(sums)
        losses, fallbacks = (sums[0] / self._world_size).tolist(), sums[1].int().tolist()
        norms = torch.stack(self._norms).tolist()
        self._unsaved += losses
        rows = [
            {**step, "loss": loss, "grad_norm": norm, "fallbacks": fallback}
            for step, loss, norm, fallback in zip(self._steps, losses, norms, fallbacks, strict=True)
        ]
        self._steps, self._losses, self._norms, self._fallbacks = [], [], [], []
        bad = next((r for r in rows if not (math.isfinite(r["loss"]) and math.isfinite(r["grad_norm"]))), None)
        if self.writes:
            self._write(rows[: rows.index(bad)] if bad else rows)
        if bad:
            raise RunError(
                f"step {bad['step']}: loss={bad['loss']}, grad_norm={bad['grad_norm']}: not finite; training stops, the"
                " checkpoints before it stay; lower optim.lr"
            )

    def loss_since_last_save(self) -> float:
        """The mean over the steps flushed since this was asked before."""
        mean = sum(self._unsaved) / len(self._unsaved)
        self._unsaved = []
        return mean

    def _write(self, rows: list[dict[str, float]]) -> None:
        if not rows:
            return
        self._metrics.writelines(json.dumps(row) + "\n" for row in rows)
        sync(self._metrics)
        position, now = rows[-1]["position"], time.perf_counter()
        rate = (position - self._flushed[1]) / (now - self._flushed[0])
        self._flushed = (now, position)
        names = ("loss", "grad_norm", "lr", "grouped", "fallbacks")
        means = {name: sum(row[name] for row in rows) / len(rows) for name in names}
        for name, value in {**means, "images_per_second": rate}.items():
            self._board.add_scalar(f"train/{name}", value, position)
        self._bar.set_postfix(loss=f"{means['loss']:.4f}", refresh=False)
        self._bar.update(position - self._bar.n)

    def plan(self, epoch: int, position: int, plan: Plan) -> None:
        """Say how many groups of an epoch the query could not fill."""
        if self.writes and len(plan.fallback):
            share = float(plan.fallback.mean())
            self._board.add_scalar("plan/fallback_share", share, position)
            if share:
                self.say(f"epoch {epoch}: {plan.fallback.sum()} of {len(plan.fallback)} groups are fallbacks")

    def picture(self, name: str, picture: np.ndarray, position: int) -> None:
        """An image (height, width, channels) uint8 for TensorBoard."""
        if self.writes:
            self._board.add_image(name, picture, position, dataformats="HWC")

    def scalar(self, name: str, value: float, position: int) -> None:
        """A number for TensorBoard."""
        if self.writes:
            self._board.add_scalar(name, value, position)

    def measures(self, record: dict, position: int) -> None:
        """How good samples are: a line of measures.jsonl, and its numbers for TensorBoard."""
        if self.writes:
            self._measures.write(json.dumps({"position": position, **record}) + "\n")
            sync(self._measures)
            for name, value in record.items():
                if isinstance(value, float):
                    self._board.add_scalar(f"evaluate/{name}", value, position)

    def has_measures(self, position: int) -> bool:
        """Whether a line of measures.jsonl is of this position."""
        lines = Path(self._measures.name).read_text().splitlines()
        return any(json.loads(line)["position"] == position for line in lines)

    def say(self, message: str) -> None:
        """A line above the progress bar."""
        if self.writes:
            self._bar.write(message, sys.stderr)

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, _: type | None, error: BaseException | None, __: object) -> None:
        if error is not None:
            add_facts(error, step=self._next_step)
            error.add_note(f"in step {self._next_step}")
        if self.writes:
            self._bar.close()
            self._board.close()
            self._metrics.close()
            self._measures.close()


def _continue_rows(path: Path, position: int) -> TextIO:
    """The file, open for more rows, without those after `position`: steps of a killed run that will be done again."""
    kept = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                row = json.loads(line)
            except ValueError:  # cut off
                break
            if row["position"] > position:
                break
            kept.append(line + "\n")
    partial = path.with_suffix(".partial")
    with partial.open("w") as file:
        file.writelines(kept)
        sync(file)
    partial.replace(path)
    return path.open("a")
