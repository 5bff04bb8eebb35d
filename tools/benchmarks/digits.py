"""The demo's quality: Frechet distance and class accuracy over 3 seeds, plain (UC = 1) and GroupDiff-l-4 (UC = 4)."""

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks import Figures, Targets
from data.sets.registry import DataConfig, open_halves
from trainer.checkpoints.weights import WeightSource, find_checkpoint
from trainer.config.tree import load_config
from trainer.evaluation.classifier import evaluate
from trainer.sampling.samples import make_samples

CONFIG = "configs/digits.yaml"
RUNS = {"uc1": ["groups.variant=none", "groups.size=1"], "uc4": ["groups.variant=light", "groups.size=4"]}
SEEDS, PER_CLASS = 3, 100


def measure() -> tuple[Figures, Targets]:
    """Train each variant with each seed as the demo does (two processes), sample 1,000 images, evaluate."""
    splits = open_halves(DataConfig.model_validate({}))
    figures: Figures = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, overrides in RUNS.items():
            reports = []
            for seed in range(SEEDS):
                run = Path(folder) / f"{name}-{seed}"
                settings = [f"run={run}", f"seed={seed}", "train.sample_every=0", *overrides]
                settings += [f"sample.per_class={PER_CLASS}", f"sample.seed={seed}"]
                command = [sys.executable, "tools/submit.py", "--cluster", "local", "--procs", "2", CONFIG, *settings]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                pixels, label, _ = make_samples(WeightSource(find_checkpoint(run)), load_config(run / "config.yaml"))
                reports.append(evaluate(pixels.reshape(-1, *pixels.shape[2:]), label.ravel(), *splits))
            for measure in ("frechet", "class_accuracy"):
                values = [report[measure] for report in reports]
                figures[f"{name}_{measure}"] = statistics.mean(values)
                figures[f"{name}_{measure}_std"] = float(np.std(values, ddof=1))
    figures["real_train_frechet"] = reports[0]["frechet_train"]
    figures["real_heldout_accuracy"] = reports[0]["heldout_accuracy"]
    return figures, {}
