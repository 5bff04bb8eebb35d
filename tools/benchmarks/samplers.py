"""Frechet distance of digits against the number of evaluations, for every sampler: table and plot for results/."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt

from benchmarks import Figures, Targets
from data.images import DataConfig, open_images
from models.samplers import SAMPLERS
from trainer.config import load_config, parse_config
from trainer.evaluate import evaluate
from trainer.samples import make_samples
from trainer.weights import find_checkpoint

RESULTS, PER_CLASS, BUDGETS = Path("results"), 100, (4, 8, 16, 32, 64, 128, 250)
RUNS = {  # by path: what is changed of the demo
    "linear": [],
    "ddpm": ["path=ddpm", "model.time_scale=1", "optim.lr=2e-3", "train.images=256_000", "sample.sampler=ddpm"],
}


def measure() -> tuple[Figures, Targets]:
    """Train the demo's network on two paths, make 1,000 samples by every sampler at every budget, evaluate. Guidance 1:
    the distance is then the sampler's, not the guidance's."""
    splits = [open_images(DataConfig(), split) for split in ("train", "heldout")]
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        for path, changes in RUNS.items():
            run = Path(folder) / path
            command = [sys.executable, "tools/submit.py", "--cluster", "local", "--procs", "2", "configs/digits.yaml"]
            subprocess.run([*command, f"run={run}", "train.sample_every=0", *changes], check=True, stdout=sys.stderr)
            tree = load_config(run / "config.yaml").model_dump()
            for sampler, (_, _, paths) in SAMPLERS.items():
                for budget in BUDGETS if path in paths and sampler != "dopri5" else (0,) if path in paths else ():
                    rows.append(_row(run, tree, sampler, budget, splits))
                    print(rows[-1], file=sys.stderr)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "samplers.json").write_text(json.dumps(rows, indent=1) + "\n")
    _plot(rows)
    figures = {f"{r['path']}_{r['sampler']}_{r['evaluations']}": r["frechet"] for r in rows}
    figures["real_train"] = rows[0]["frechet_train"]
    return figures, {}


def _row(run: Path, tree: dict, sampler: str, budget: int, splits: list) -> dict:
    """With about `budget` evaluations a sample; of dopri5, 0, as its tolerance asks."""
    steps = {"heun": budget // 2, "pseudo_corrector": budget - 1}.get(sampler, budget) or 1
    sample = {**tree["sample"], "sampler": sampler, "steps": steps, "guidance": 1, "per_class": PER_CLASS}
    pixels, label, record = make_samples(find_checkpoint(run), parse_config({**tree, "sample": sample}))
    report = evaluate(pixels.reshape(-1, *pixels.shape[2:]), label.ravel(), *splits)
    names = ("frechet", "class_accuracy", "frechet_train")
    about = {"path": tree["path"]["name"], "sampler": sampler, "evaluations": record["evaluations"]}
    return about | {name: report[name] for name in names}


def _plot(rows: list[dict]) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for path, style in (("linear", "-"), ("ddpm", "--")):
        for sampler in SAMPLERS:
            line = [row for row in rows if (row["path"], row["sampler"]) == (path, sampler)]
            if line:
                x, y = ([row[name] for row in line] for name in ("evaluations", "frechet"))
                axes.plot(x, y, style, marker="o", markersize=4, label=f"{sampler}, {path}")
    axes.axhline(rows[0]["frechet_train"], color="black", linewidth=0.8, label="real training images")
    axes.set(xscale="log", yscale="log", xlabel="network evaluations", ylabel="Frechet distance", title="Digits")
    axes.legend(fontsize=8)
    figure.savefig(RESULTS / "samplers.svg")
