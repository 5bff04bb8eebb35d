"""Frechet distance of digits against the number of evaluations, for every sampler: table and plot for results/."""

import json
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from benchmarks import Figures, Targets
from data.sets.registry import open_halves
from models.paths.registry import make_path, path_config
from models.sampling.registry import SAMPLERS, fitting_samplers
from trainer.checkpoints.weights import WeightSource, find_checkpoint
from trainer.config.tree import change_config, load_config
from trainer.evaluation.classifier import evaluate
from trainer.loop import train
from trainer.run_folder import read_config
from trainer.sampling.samples import make_samples

RESULTS, PER_CLASS, BUDGETS = Path("results"), 100, (4, 8, 16, 32, 64, 128)
CONFIG = "configs/ablation/digits.yaml"
RUNS = {  # by path: what is changed of the config
    "linear": [],
    "ddpm": ["path=ddpm", "model.time_scale=1", "optim.lr=2e-3", "train.images=153_600", "sample.sampler=ddpm"],
}


def measure() -> tuple[Figures, Targets]:
    """Train a network on each of two paths, make 1,000 samples by every sampler at every budget, evaluate. Guidance 1:
    the distance is then the sampler's, not the guidance's."""
    with tempfile.TemporaryDirectory() as folder:
        runs = [(path, Path(folder) / path) for path in RUNS]
        # a process for each core, which computes with one thread: the fastest way through small networks
        with ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), torch.set_num_threads, (1,)) as pool:
            list(pool.map(_train, *zip(*runs, strict=True)))
            todo = [
                (run, sampler, budget)
                for path, run in runs
                for sampler in fitting_samplers(make_path(path_config(path)))
                for budget in ((0,) if sampler == "dopri5" else BUDGETS)
            ]
            todo.sort(key=lambda row: -row[2])  # the longest first, so that no process waits at the end
            rows = list(pool.map(_row, *zip(*todo, strict=True)))
    rows.sort(key=lambda row: (-list(RUNS).index(row["path"]), row["sampler"], row["evaluations"]))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "samplers.json").write_text(json.dumps(rows, indent=1) + "\n")
    _plot(rows)
    figures = {f"{r['path']}_{r['sampler']}_{r['evaluations']}": r["frechet"] for r in rows}
    figures["real_train"] = rows[0]["frechet_train"]
    return figures, {}


def _train(path: str, run: Path) -> None:
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    train(load_config(CONFIG, [*RUNS[path], f"run={run}"]))


def _row(run: Path, sampler: str, budget: int) -> dict:
    """With about `budget` evaluations a sample; of dopri5, 0, as its tolerance asks."""
    config = read_config(run)
    steps = {"heun": budget // 2, "pseudo_corrector": budget - 1}.get(sampler, budget) or 1
    sample = {"sampler": sampler, "steps": steps, "guidance": 1, "per_class": PER_CLASS}
    config = change_config(config, [f"sample.{name}={value}" for name, value in sample.items()])
    pixels, label, record = make_samples(WeightSource(find_checkpoint(run)), config)
    report = evaluate(pixels.reshape(-1, *pixels.shape[2:]), label.ravel(), *open_halves(config.data))
    names = ("frechet", "class_accuracy", "frechet_train")
    about = {"path": config.path.name, "sampler": sampler, "evaluations": record["evaluations"]}
    print(about, report["frechet"], file=sys.stderr)
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
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": ""}):  # text as text, and the same file each time
        figure.savefig(RESULTS / "samplers.svg", metadata={"Date": None})
