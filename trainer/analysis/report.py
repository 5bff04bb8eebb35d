"""A self-contained HTML page of runs and ablations: curves, samples, measures, attention, config."""

import base64
import html
import io
import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from trainer.errors import RunError
from trainer.run_folder import CONFIG

POINTS = 400  # per curve, each the mean of several steps
CURVES = {"loss": "log", "grad_norm": "log", "lr": "linear"}  # columns of metrics.jsonl, and the scales of their axes
PICTURES = {
    "samples.png": "Samples",
    "sweep/sweep.png": "Sweep of sampling",
    "attention/**/*.png": "Attention between the images of groups",
    "probe/probe.png": "Linear probe",
}
MEASURES = {
    "report.json": "tools/evaluate.py, by a classifier of the real images",
    "evaluations.jsonl": "tools/evaluate.py, by a detector",
    "measures.jsonl": "while training",
    "sweep/sweep.jsonl": "sweep of sampling",
}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222; }
h1, h2 { border-bottom: 1px solid #ddd; padding-bottom: .2em; }
img { max-width: 100%; image-rendering: pixelated; } img.drawing { image-rendering: auto; }
table { border-collapse: collapse; display: block; overflow-x: auto; font-variant-numeric: tabular-nums; }
td, th { border: 1px solid #ddd; padding: .25em .6em; text-align: right; white-space: nowrap; }
td:first-child, th:first-child { text-align: left; } th { background: #f6f6f6; }
pre { background: #f6f6f6; padding: 1em; overflow-x: auto; } figure { margin: 1em 0; } figcaption { color: #666; }
"""


def render(folders: list[Path]) -> str:
    """Return the page of these run folders and ablation folders. Raise RunError for a folder that is neither."""
    runs, ablations = [], []
    for folder in folders:
        if (folder / "ablation.json").is_file():
            ablations.append(folder)
        elif (folder / CONFIG).is_file():
            runs.append(folder)
        else:
            raise RunError(f"{folder}: neither a run ({CONFIG}) nor an ablation (ablation.json); give one of them")
    parts = [_ablation(folder) for folder in ablations]
    if runs:
        parts.append(f"<h2>Curves</h2>{_curves(runs)}")
    parts += [_run(folder) for folder in runs]
    title = ", ".join(folder.name for folder in folders)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style></head><body><h1>{html.escape(title)}</h1>{''.join(parts)}"
        f"<p>group-diffusion {version('group-diffusion')}</p></body></html>\n"
    )


def _run(folder: Path) -> str:
    parts = [f"<h2>{html.escape(str(folder))}</h2>"]
    tables = {said: read_records(folder / name) for name, said in MEASURES.items()}
    parts += [f"<h3>Measures: {said}</h3>{table(rows)}" for said, rows in tables.items() if rows]
    for pattern, said in PICTURES.items():
        shown = "".join(_picture(path, str(path.relative_to(folder))) for path in sorted(folder.glob(pattern)))
        parts.append(f"<h3>{said}</h3>{shown}" if shown else "")
    parts.append(f"<details><summary>Config</summary><pre>{html.escape((folder / CONFIG).read_text())}</pre></details>")
    return "".join(parts)


def _ablation(folder: Path) -> str:
    content = json.loads((folder / "ablation.json").read_text())
    results = [{"s_cross": row.get("score"), **row} for row in content["rows"]]  # "score" in older versions
    rows = [
        {
            "axis": row["axis"],
            "value": row["value"],
            "seeds": row["seeds"],
            **{name: f"{mean:.4g} ± {deviation:.2g}" for name, (mean, deviation) in row["best"].items()},
            "gain (unpaired)": _gain(row["gain"]["best"]) if row.get("gain") else "",  # not in older versions
            "at real accuracy": "{:.4g} ± {:.2g}".format(*row["matched"]) if row["matched"] else "",
            "S_cross": "{:.4g} ± {:.2g}".format(*row["s_cross"]) if row["s_cross"] else "",
        }
        for row in results
    ]
    correlations = content.get("s_cross_frechet_r") or content.get("score_frechet_r", {})
    r = ", ".join(f"{value:.2f} at {weight}" for weight, value in correlations.items())
    said = f"<p>Correlation of S_cross and Frechet distance: {r}</p>" if r else ""
    picture = _picture(folder / "ablation.svg", "mean and standard deviation over seeds")
    return (
        f"<h2>{html.escape(str(folder))}</h2><p>The point of each guidance curve with the least Frechet distance.</p>"
        f"{table(rows)}{said}{picture}"
    )


def _gain(found: dict) -> str:
    text = f"{found['mean']:.4g}"
    return text if found["paired"] is None else f"{text} ± {found['paired']:.2g} ({found['unpaired']:.2g})"


def read_records(path: Path) -> list[dict]:
    """Return rows of plain values from a JSON file, or a file of one JSON object a line, whose last line may be half
    written; none if there is no file."""
    if not path.is_file():
        return []
    text = path.read_text()
    records = (
        [json.loads(text)]
        if path.suffix == ".json"
        else [json.loads(line) for line in text.splitlines() if line.endswith("}")]
    )
    return [_plain(record) for record in records]


def _plain(record: dict) -> dict:
    """Return a record's numbers and names; of its settings, only those that were chosen or differ from row to row."""
    row = {name: value for name, value in record.items() if isinstance(value, int | float | str)}
    row |= record.get("axes", {})
    made = record.get("samples", {})
    names = (
        "position",
        "weights",
        "sampler",
        "steps",
        "evaluations",
        "guidance",
        "uncond_group_size",
        "labels",
        "seed",
    )
    row |= {name: _value(made[name]) for name in names if name in made and name not in row}
    return row | ({"count": record["images"]["images"]} if isinstance(record.get("images"), dict) else {})


def _value(value: object) -> object:
    return ", ".join(map(str, value)) if isinstance(value, list) else value


def table(rows: list[dict]) -> str:
    """Return an HTML table with a column for each name in any row."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    lines = ("".join(f"<td>{html.escape(_text(row.get(name, '')))}</td>" for name in names) for row in rows)
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _text(value: object) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _curves(runs: list[Path]) -> str:
    """Return one figure with the curves of all runs: of training, and of the measures taken while training."""
    trained = {run: read_records(run / "metrics.jsonl") for run in runs}
    measured = {run: read_records(run / "measures.jsonl") for run in runs}
    found = {n for rows in measured.values() for row in rows for n, v in row.items() if isinstance(v, float)}
    panels = [(trained, name) for name in CURVES] + [(measured, name) for name in sorted(found)]
    height = -(-len(panels) // 2)
    figure = Figure(figsize=(11, 3 * height), layout="constrained")  # without pyplot: needs no display
    for place, (rows, name) in enumerate(panels, 1):
        axes = figure.add_subplot(height, 2, place, xlabel="images", ylabel=name, yscale=CURVES.get(name, "linear"))
        for run in runs:
            x, y = thinned([(row["position"], row[name]) for row in rows[run] if name in row])
            axes.plot(x, y, label=str(run), marker="o" if rows is measured else "")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    return _image(buffer.getvalue(), "svg", "drawing")


def thinned(points: list[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    """Return x and y of at most POINTS points, each the mean of successive ones, at the last x among them."""
    parts = [part for part in np.array_split(np.array(points).reshape(-1, 2), POINTS) if len(part)]
    return np.array([part[-1, 0] for part in parts]), np.array([part[:, 1].mean() for part in parts])


def _picture(path: Path, caption: str) -> str:
    kind = path.suffix.lstrip(".")
    drawing = "" if path.name == "samples.png" else "drawing"
    return f"<figure>{_image(path.read_bytes(), kind, drawing)}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _image(content: bytes, kind: str, style: str) -> str:
    form = {"svg": "svg+xml"}.get(kind, kind)
    return f'<img class="{style}" alt="" src="data:image/{form};base64,{base64.b64encode(content).decode()}">'
