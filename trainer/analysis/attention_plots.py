"""Plots of the attention between the images of a group."""

import math
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from trainer.analysis.attention import OneGroup
from trainer.analysis.cross_attention import EDGES, CrossAttention

MOST_LAYERS = 6  # for which the attention of a patch is shown
MOST_NUMBERED = 8  # images in a group for which there is room for numbers
GRID = {"aspect": "auto", "origin": "lower"}


def level_map(attention: CrossAttention, group_size: int) -> Figure:
    """Plot, by layer and noise level, S_cross and the share of attention that leaves an image, relative to uniform
    attention; blank where no groups share attention."""
    uniform = 1 - 1 / group_size
    figure = _figure(10, 1.6 + 0.25 * len(attention.s_cross))
    left, right = figure.subplots(1, 2)
    shown = left.imshow(attention.s_cross.numpy(), vmin=0, **GRID)
    figure.colorbar(shown, ax=left)
    left.set_title(f"S_cross, mean {attention.mean_s_cross:.4f}", fontsize=10)
    shown = right.imshow(attention.cross_share.numpy(), **_around(uniform, attention.cross_share.numpy()), **GRID)
    figure.colorbar(shown, ax=right)
    title = (
        f"attention to other images, mean {attention.mean_cross_share:.4f}\n(white: {uniform:.4f}, uniform attention)"
    )
    right.set_title(title, fontsize=10)
    for axes in (left, right):
        axes.set_xlabel("log-SNR (noisy to clean)")
        axes.set_xticks(np.arange(len(EDGES)) + 0.5, [f"{edge:g}" for edge in EDGES])
        axes.set_ylabel("layer")
        axes.set_yticks(range(0, len(attention.s_cross), math.ceil(len(attention.s_cross) / 14)))
    return figure


def image_map(group: OneGroup, name: str) -> Figure:
    """Plot the images of a group and, at each noise level, the attention from each to each, in percent."""
    size, levels = len(group.label), len(group.levels)
    figure = _figure(2.2 * levels, 4.4)
    figure.suptitle(
        f"{name}: attention in percent that the image of a row sends to that of a column, mean of layers and heads"
        f" (white: {100 / size:g}, uniform attention)",
        fontsize=10,
    )
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=(1, 2))[:, 0]
    for number, axes in enumerate(above.subplots(1, size, squeeze=False)[0]):
        _image(axes, group, number)
    panels, colours = below.subplots(1, levels), _around(100 / size, 100 * group.mass)
    for axes, mass, level in zip(panels, group.mass, group.levels, strict=True):
        shown = axes.imshow(100 * mass, **colours)
        axes.set_title(f"log-SNR {level:.1f}", fontsize=10)
        axes.set_xticks(range(size))
        axes.set_yticks(range(size))
        if size <= MOST_NUMBERED:
            for (row, column), value in np.ndenumerate(mass):
                dark = abs(100 * value - 100 / size) > 0.6 * (colours["vmax"] - 100 / size)
                color = "white" if dark else "black"
                axes.text(column, row, f"{100 * value:.1f}", ha="center", va="center", fontsize=7, color=color)
    below.colorbar(shown, ax=panels, fraction=0.02)
    return figure


def patch_map(group: OneGroup, image: int, row: int, column: int) -> Figure:
    """Plot what the framed patch sends to every patch of its group: an image per column, a layer per row (some of the
    layers), and each image's share of the total below it."""
    size, cells = len(group.label), group.patch.shape[-1]
    sharing = np.flatnonzero(np.isfinite(group.patch).all(axis=(1, 2, 3)))
    layers = sharing[np.unique(np.linspace(0, len(sharing) - 1, MOST_LAYERS).round().astype(int))]
    figure = _figure(1.5 * size + 2, 1.5 * (len(layers) + 1) + 0.5)
    figure.suptitle(f"attention of the framed patch at log-SNR {group.level:.1f}", fontsize=10)
    rows = figure.subplots(len(layers) + 1, size, squeeze=False)
    for number, axes in enumerate(rows[0]):
        _image(axes, group, number)
    scale = group.pixels.shape[1] / cells
    rows[0, image].add_patch(_frame(column, row, scale))
    for layer, panels in zip(layers, rows[1:], strict=True):
        for number, axes in enumerate(panels):
            shown = axes.imshow(group.patch[layer, number], vmin=0, vmax=group.patch[layer].max())
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_xlabel(f"{100 * group.patch[layer, number].sum():.0f} %", fontsize=8)
        panels[0].set_ylabel(f"layer {layer}")
        panels[image].add_patch(_frame(column, row, 1))
        figure.colorbar(shown, ax=list(panels), fraction=0.04)
    return figure


def picture(figure: Figure) -> np.ndarray:
    """Return the figure as uint8 (height, width, 3)."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def save(figure: Figure, path: Path) -> None:
    """Save the figure as PNG."""
    FigureCanvasAgg(figure).print_png(path)


def _figure(width: float, height: float) -> Figure:
    """Return a figure of this size in inches, made without pyplot, which would keep it alive."""
    return Figure((width, height), dpi=100, layout="constrained")


def _around(middle: float, values: np.ndarray) -> dict:
    """Return colours for `imshow` that are white at `middle` and extend equally to both sides."""
    reach = max(float(np.nanmax(np.abs(values - middle))), 1e-3 * middle)
    return {"cmap": "RdBu_r", "vmin": middle - reach, "vmax": middle + reach}


def _image(axes: Axes, group: OneGroup, number: int) -> None:
    axes.imshow(group.pixels[number].squeeze(), cmap="gray", vmin=0, vmax=255)
    axes.set_title(f"{number}: class {group.label[number]}", fontsize=9)
    axes.axis("off")


def _frame(column: int, row: int, scale: float) -> Rectangle:
    """Return a frame around a patch whose side is `scale` pixels."""
    corner = scale * column - 0.5, scale * row - 0.5
    return Rectangle(corner, scale, scale, fill=False, edgecolor="red", linewidth=2)
