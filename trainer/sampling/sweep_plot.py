"""Plots of measures."""

from contextlib import suppress
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

TRADED = (("recall", "precision"), ("class_accuracy", "frechet"))  # traded for each other by guidance: x, y
COLUMNS = 4


def plot_sweep(rows: list[dict], path: Path) -> None:
    """Plot each measure of trainer.sampling.sweep's rows against the first axis, with a line for each combination of
    the others; and those that guidance trades for each other, one against the other."""
    first, *others = rows[0]["axes"]
    shared = set.intersection(*(set(row) for row in rows))  # some measures are of groups alone
    measures = [name for name, value in rows[0].items() if isinstance(value, float) and name in shared]
    varied = [name for name in measures if len({row[name] for row in rows}) > 1]
    measures = varied or measures  # the others show nothing here
    panels = [(first, name) for name in measures] + [pair for pair in TRADED if set(pair) <= set(measures)]
    lines: dict[str, list[dict]] = {}
    for row in rows:
        lines.setdefault(", ".join(f"{name}={row['axes'][name]}" for name in others), []).append(row)
    height = -(-len(panels) // COLUMNS)
    figure = Figure(figsize=(4 * COLUMNS, 3.2 * height), layout="constrained")  # without pyplot: needs no display
    for place, (x, y) in enumerate(panels, 1):
        panel = figure.add_subplot(height, COLUMNS, place, xlabel=x, ylabel=y)
        for label, line in lines.items():
            _draw(panel, [row["axes"][x] if x == first else row[x] for row in line], [row[y] for row in line], label)
    if others:
        figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=COLUMNS)
    figure.savefig(path)


def _draw(panel: Axes, x: list[str] | list[float], y: list[float], label: str) -> None:
    with suppress(ValueError):  # names, for example of weights, stay text
        x = [float(value) for value in x]
    panel.plot(x, y, marker="o", label=label)
