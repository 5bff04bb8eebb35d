"""Plots of an ablation."""

from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from trainer.ablation.runs import with_cross_attention


def plot_ablation(rows: list[dict], r: dict[str, float], path: Path) -> None:
    """Plot, for each axis, the guidance curves and, by value, the Frechet distance at its best and at the class
    accuracy of real images, with standard deviations over seeds; below, S_cross against distance at each guidance
    weight, with the correlations `r`."""
    axes = list(dict.fromkeys(row["axis"] for row in rows))
    figure = Figure(figsize=(11, 3.4 * (len(axes) + 1)), layout="constrained")  # without pyplot: needs no display
    panels = figure.subplots(len(axes) + 1, 2, squeeze=False)
    for (left, right), axis in zip(panels, axes, strict=False):
        chosen = [row for row in rows if row["axis"] == axis]
        for row in chosen:
            x, y = (
                list(zip(*(point[name] for point in row["curve"]), strict=True))
                for name in ("class_accuracy", "frechet")
            )
            left.errorbar(x[0], y[0], y[1], x[1], marker="o", markersize=4, capsize=2, label=row["value"])
        left.set(xlabel="class accuracy", ylabel="Frechet distance", title=f"{axis}: guidance curves", yscale="log")
        left.legend(fontsize=8)
        for label, values in (
            ("best of each curve", [row["best"]["frechet"] for row in chosen]),
            ("at the accuracy of real images", [row["matched"] for row in chosen]),
        ):
            there = [i for i, value in enumerate(values) if value]
            mean, deviation = ([values[i][part] for i in there] for part in (0, 1))
            right.errorbar(there, mean, deviation, fmt="o", capsize=4, label=label)
        right.set_xticks(range(len(chosen)), [row["value"] for row in chosen])
        right.set(ylabel="Frechet distance", title=axis, xlim=(-0.5, len(chosen) - 0.5))
        right.legend(fontsize=8)
    left, right = panels[-1]
    for place, (weight, correlation) in enumerate(r.items()):
        points = [(row["s_cross"], row["curve"][place]["frechet"]) for row in with_cross_attention(rows)]
        (x, dx), (y, dy) = (zip(*values, strict=True) for values in zip(*points, strict=True))
        left.errorbar(x, y, dy, dx, fmt="o", markersize=4, label=f"{weight}: r = {correlation:.2f}")
    left.set(xlabel="S_cross", ylabel="Frechet distance", yscale="log")
    if r:
        left.legend(fontsize=8)
    right.axis("off")
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": ""}):  # text stays text, the file is reproducible
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
