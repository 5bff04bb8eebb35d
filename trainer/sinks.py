"""Where a run's reports go: metrics.jsonl and measures.jsonl, TensorBoard, a progress bar.

To add a sink, write a subclass of Sink and give it a line in SINKS; `train.sinks` selects by these names.
"""

import json
from pathlib import Path
from typing import TextIO

import numpy as np
from tqdm import tqdm

from data.stores.files import sync, write_text


class Sink:
    """A place that a run reports to, on rank 0. A sink overrides only what it wants."""

    def __init__(self, folder: Path, position: int, images: int) -> None:
        """Continue the reports of the run in `folder`, which has seen `position` of its `images` images. Drop what was
        reported after `position`: a killed run repeats these steps."""

    def rows(self, rows: list[dict[str, float]]) -> None:
        """Take the rows of steps, in order, each with `step`, the `position` after it, `loss` and more."""

    def scalars(self, values: dict[str, float], position: int) -> None:
        """Take numbers by their tags, such as train/loss (a mean since the last call) or evaluate/fid."""

    def picture(self, name: str, picture: np.ndarray, position: int) -> None:
        """Take an image (height, width, channels) uint8."""

    def evaluation(self, row: dict) -> None:
        """Take the metrics of an evaluation and its `position`."""

    def text(self, message: str) -> None:
        """Take a line that also goes to stderr."""

    def close(self) -> None:
        """Write what is not written yet: the run is ending."""


class Metrics(Sink):
    """metrics.jsonl with a row per step, and measures.jsonl with a row per evaluation."""

    def __init__(self, folder: Path, position: int, images: int) -> None:
        self._steps = _continue_rows(folder / "metrics.jsonl", position)
        self._evaluations = _continue_rows(folder / "measures.jsonl", position)

    def rows(self, rows: list[dict[str, float]]) -> None:
        """Append the rows; they are on disk when this returns."""
        self._steps.writelines(json.dumps(row) + "\n" for row in rows)
        sync(self._steps)

    def evaluation(self, row: dict) -> None:
        """Append the row; it is on disk when this returns."""
        self._evaluations.write(json.dumps(row) + "\n")
        sync(self._evaluations)

    def close(self) -> None:
        """Close both files."""
        self._steps.close()
        self._evaluations.close()


class TensorBoard(Sink):
    """Events for TensorBoard."""

    def __init__(self, folder: Path, position: int, images: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self._board = SummaryWriter(str(folder), purge_step=position + 1)

    def scalars(self, values: dict[str, float], position: int) -> None:
        """Add each as a curve."""
        for name, value in values.items():
            self._board.add_scalar(name, value, position)

    def picture(self, name: str, picture: np.ndarray, position: int) -> None:
        """Add the image under its name."""
        self._board.add_image(name, picture, position, dataformats="HWC")

    def close(self) -> None:
        """Write the events."""
        self._board.close()


class Progress(Sink):
    """A bar on stderr, with the loss."""

    def __init__(self, folder: Path, position: int, images: int) -> None:
        self._bar = tqdm(total=images, initial=position, unit="img", unit_scale=True, desc="train", mininterval=0.5)

    def rows(self, rows: list[dict[str, float]]) -> None:
        """Advance the bar, and show the mean loss."""
        loss = sum(row["loss"] for row in rows) / len(rows)
        self._bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        self._bar.update(rows[-1]["position"] - self._bar.n)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()


SINKS: dict[str, type[Sink]] = {"metrics": Metrics, "tensorboard": TensorBoard, "progress": Progress}


def has_evaluation(folder: Path, position: int) -> bool:
    """Return whether a row of the run's measures.jsonl has this position."""
    path = folder / "measures.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return any(json.loads(line)["position"] == position for line in lines)


def _continue_rows(path: Path, position: int) -> TextIO:
    """Open a file to append rows, dropping those after `position`."""
    kept = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                row = json.loads(line)
            except ValueError:  # a line that was cut off
                break
            if row["position"] > position:
                break
            kept.append(line + "\n")
    write_text(path, "".join(kept))
    return path.open("a")
