"""Rerun the method's claims: one run for each value of an axis and each seed, with its guidance curve and how much the
images of its groups attend to one another (S_cross)."""

import itertools
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from data.sets.registry import DataConfig, open_halves
from data.stores.claims import Claims
from data.stores.files import write_json
from trainer.ablation.gains import gain, shown
from trainer.analysis import attention
from trainer.checkpoints.weights import WeightSource, find_checkpoint
from trainer.config.fields import marked, matches
from trainer.config.parsing import dotted, to_yaml
from trainer.config.sweeps import parse_sweep
from trainer.config.tree import Config, load_config
from trainer.errors import RunError
from trainer.evaluation.classifier import make_evaluator
from trainer.loop import train
from trainer.ranks import local_device
from trainer.sampling.labels import check_per_class
from trainer.sampling.samples import make_samples

ATTENTION_GROUPS = 64  # groups over which a run's S_cross is measured


@dataclass(frozen=True)
class Cell:
    """A run: the value of an axis, a seed, and the run's name; identical runs of two axes share a name."""

    axis: str
    value: str
    seed: int
    name: str


def plan_cells(
    path: Path, overrides: list[str], axes: list[str], seeds: int, out: Path
) -> tuple[list[Cell], dict[str, Config]]:
    """Return all runs for `axes` (for example `groups.size=1,2,4`), each axis varied on its own and the rest as in the
    config; and the configs by run name."""
    cells: list[Cell] = []
    configs: dict[str, Config] = {}
    known: dict[str, str] = {}
    for axis in axes:
        name, values = parse_sweep("--axis", axis)
        for value in values:
            for seed in range(seeds):
                label = f"{name}={value},seed={seed}".replace("/", "_")
                config = load_config(
                    path, [*overrides, f"{name}={value}", f"seed={seed}", f"run={out / 'runs' / label}"]
                )
                check_per_class(config.sample)
                content = to_yaml(config.model_copy(update={"run": ""}))
                first = known.setdefault(content, label)
                configs.setdefault(first, config)
                cells.append(Cell(name, value, seed, first))
    return cells, configs


def check_results(configs: dict[str, Config], guidance: tuple[float, ...], out: Path) -> None:
    """Raise RunError if an existing result was made with other settings: a table must not mix settings."""
    for name, config in configs.items():
        path = out / f"{name}.json"
        if not path.exists():
            continue
        before, now = json.loads(path.read_text()).get("settings"), _settings(config, guidance)
        if before is None:
            raise RunError(f"{path}: says no settings, so another version made it; give another --out")
        for field, value in now.items():
            if before.get(field) != value:
                raise RunError(
                    f"{field}={value}: {path} was made with {field}={before.get(field)}; set it back, or give another"
                    " --out"
                )


def _settings(config: Config, guidance: tuple[float, ...]) -> dict:
    """Return the settings that a result depends on, as they come back from JSON."""
    fields = dotted(config.model_dump(mode="json"))
    free = marked(Config, "affects_results", False)
    return {name: fields[name] for name in fields if not matches(name, free)} | {"--guidance": list(guidance)}


def run_cells(
    configs: dict[str, Config], guidance: tuple[float, ...], out: Path, process: int = 0, processes: int = 1
) -> None:
    """Train, sample and measure the runs that no other process has claimed; each leaves NAME.json in `out`. A killed
    run resumes from its newest checkpoint."""
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")  # a run in this process alone
    if local_device().type == "cpu":  # sums depend on the number of threads, and that on the number of processes
        torch.set_num_threads(1)
        threadpool_limits(1)  # for NumPy and scikit-learn, which evaluate
    names = list(configs)
    claims = Claims(out, [f"{name}.json" for name in names], process * len(names) // processes)
    evaluators: dict[DataConfig, Callable] = {}  # kept: making one takes longer than calling it
    for number in claims:
        config = configs[names[number]]
        if config.data not in evaluators:
            evaluators[config.data] = make_evaluator(*open_halves(config.data))
        result = measure_run(config, guidance, evaluators[config.data])
        write_json(out / f"{names[number]}.json", result | {"settings": _settings(config, guidance)})
        claims.release(number)


def measure_run(config: Config, guidance: tuple[float, ...], evaluate: Callable[..., dict[str, float]]) -> dict:
    """Return {"curve": metrics of trainer/evaluation/classifier.py at each guidance weight, "s_cross": S_cross or
    None}."""
    train(config)
    checkpoint = find_checkpoint(Path(config.run))
    curve = []
    for weight in guidance:
        sample = config.sample.model_copy(update={"guidance": (weight,)})
        pixels, label, _ = make_samples(WeightSource(checkpoint), config.model_copy(update={"sample": sample}))
        measures = evaluate(pixels.reshape(-1, *pixels.shape[2:]), label.ravel(), sample.group_size)
        curve.append({"guidance": weight, **measures})
    return {"curve": curve, "s_cross": s_cross(WeightSource(checkpoint), config)}


def s_cross(source: WeightSource, config: Config) -> float | None:
    """Return S_cross of groups of the data, noised as in training, over layers and levels; None without groups."""
    if config.groups.size < 2 or config.model.group_layers == ():
        return None
    loaded = attention.load_grouped(source, config)
    return attention.data_attention(loaded, attention.draw_groups(config, ATTENTION_GROUPS)).mean_s_cross


def summarise(cells: list[Cell], out: Path) -> list[dict]:
    """Return a row per axis and value: each measure as (mean, standard deviation) over the seeds, at every guidance
    weight (`curve`) and at each seed's best weight by Frechet distance (`best`); the Frechet distance where the curve
    reaches the class accuracy of real images (`matched`; None if any curve does not); S_cross; and `gain`: what these
    three Frechet distances fall by from the axis's first value, as trainer.ablation.gains has it (the first: None)."""
    rows: list[dict] = []
    first: dict[str, tuple[str, dict]] = {}  # value and distances of each axis's first row
    for axis, value in dict.fromkeys((cell.axis, cell.value) for cell in cells):
        runs = [_read_result(out / f"{c.name}.json") for c in cells if (c.axis, c.value) == (axis, value)]
        curves = [run["curve"] for run in runs]
        best = [min(curve, key=lambda point: point["frechet"]) for curve in curves]
        matched = [found for found in map(at_real_accuracy, curves) if found is not None]
        matched = matched if len(matched) == len(curves) else []
        measured = [run["s_cross"] for run in runs if run["s_cross"] is not None]
        distances = {
            "best": [point["frechet"] for point in best],
            "matched": matched,
            "curve": [[point["frechet"] for point in points] for points in zip(*curves, strict=True)],
        }
        over, before = first.setdefault(axis, (value, distances))
        rows.append(
            {
                "axis": axis,
                "value": value,
                "seeds": len(runs),
                "best": _statistics(best),
                "curve": [_statistics(points) for points in zip(*curves, strict=True)],
                "matched": _mean_std(matched) if matched else None,
                "s_cross": _mean_std(measured) if measured else None,
                "gain": None if over == value else {"over": over, **_gains(before, distances)},
            }
        )
    return rows


def _gains(before: dict, after: dict) -> dict:
    both = before["matched"] and after["matched"]
    return {
        "best": gain(before["best"], after["best"]),
        "matched": gain(before["matched"], after["matched"]) if both else None,
        "curve": [gain(*points) for points in zip(before["curve"], after["curve"], strict=True)],
    }


def at_real_accuracy(curve: list[dict]) -> float | None:
    """Return the Frechet distance, linearly interpolated, where class accuracy first passes that of held-out real
    images as guidance grows: at a fixed weight, samples may be nearer to real ones just because guidance is weaker."""
    for low, high in itertools.pairwise(curve):
        below, above = (point["class_accuracy"] - point["heldout_accuracy"] for point in (low, high))
        if below <= 0 < above:
            share = below / (below - above)
            return (1 - share) * low["frechet"] + share * high["frechet"]
    return None


def correlations(rows: list[dict]) -> dict[str, float]:
    """Return Pearson's r of S_cross and Frechet distance at each guidance weight, over the rows with groups of 3 or
    more, where S_cross is informative, counting each run once; leave out an r of fewer than three runs."""
    found = {}
    for place, point in enumerate(rows[0]["curve"]):
        points = {(row["s_cross"][0], row["curve"][place]["frechet"][0]) for row in with_cross_attention(rows)}
        if len(points) > 2:
            found[f"w={point['guidance'][0]:g}"] = float(np.corrcoef(np.array(list(points)).T)[0, 1])
    return found


def with_cross_attention(rows: list[dict]) -> list[dict]:
    """Return the rows whose S_cross is not 0; for groups of 2 it always is."""
    return [row for row in rows if row["s_cross"] and row["s_cross"][0] > 0]


def table(rows: list[dict]) -> str:
    """Return a Markdown table: each guidance curve's best point, what its distance gains over the axis's first value
    (mean ± standard error over pairs of runs of one seed; in brackets, over unpaired ones), and the distance at the
    accuracy of real images."""
    head = [
        "axis",
        "value",
        "Frechet distance",
        "gain (unpaired)",
        "at w",
        "class accuracy",
        "precision",
        "recall",
        "at real accuracy",
        "S_cross",
    ]
    lines = [" | ".join(head), " | ".join(["---"] * len(head))]
    for row in rows:
        best, measured = row["best"], row["s_cross"]
        lines.append(
            " | ".join(
                [
                    f"`{row['axis']}`",
                    row["value"],
                    _shown(best["frechet"], 2),
                    shown(row["gain"]["best"]) if row["gain"] else "",
                    _shown(best["guidance"], 1),
                    _shown([100 * x for x in best["class_accuracy"]], 1) + " %",
                    _shown(best["precision"], 3),
                    _shown(best["recall"], 3),
                    _shown(row["matched"], 2) if row["matched"] else "",
                    _shown([100 * x for x in measured], 1) + " %" if measured else "",
                ]
            )
        )
    return "".join(f"| {line} |\n" for line in lines)


def _read_result(path: Path) -> dict:
    result = json.loads(path.read_text())
    return {"s_cross": result.get("score"), **result}  # the key in older versions


def _statistics(points: Iterable[dict]) -> dict[str, tuple[float, float]]:
    points = list(points)
    shared = [name for name in points[0] if all(name in point for point in points)]  # older results lack some
    return {name: _mean_std([point[name] for point in points]) for name in shared}


def _mean_std(values: list[float]) -> tuple[float, float]:
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def _shown(value: tuple[float, float] | list[float], digits: int) -> str:
    return f"{value[0]:.{digits}f} ± {value[1]:.{digits}f}"
