"""Sample one checkpoint with every combination of some sampling settings, measure each, and make a table."""

import json
from collections.abc import Callable
from pathlib import Path

from trainer.checkpoints.weights import WeightSource
from trainer.config.fields import marked, matches
from trainer.config.sweeps import combinations, parse_sweep
from trainer.config.tree import Config, change_config
from trainer.errors import RunError
from trainer.run_folder import read_config
from trainer.sampling.labels import check_per_class
from trainer.sampling.networks import fixed
from trainer.sampling.samples import RECORDED_LATER, make_samples, write_samples

WEIGHTS = "weights"  # the axis of the weights: ema, raw, or a file, like those of tools/reconstruct_ema.py
Axes = dict[str, list[str]]  # values of each swept setting


def parse_axes(sweeps: list[str]) -> Axes:
    """Parse sweeps like `sample.guidance=1,1.5,2`. Raise RunError for a field that is not a sampling setting."""
    axes = {}
    for sweep in sweeps:
        name, values = parse_sweep("--sweep", sweep, "sample.guidance=1,1.5,2")
        if name != WEIGHTS and not _of_sampling(name):
            raise RunError(f"--sweep {sweep}: only sample.* and {WEIGHTS} (ema, raw, a file) can be swept here")
        axes[name] = values
    return axes


def run_sweep(
    checkpoint: Path,
    axes: Axes,
    overrides: list[str],
    out: Path,
    measure: Callable[[Path], dict],
    progress: Callable[[int], object] = lambda number: None,
) -> list[dict]:
    """Return a row {"axes", measures} for each combination, also written as a line of `out`/sweep.jsonl. Each
    combination's samples have a folder below `out`; existing ones with the same settings are not made again, so the
    same call resumes a killed one. `measure` takes such a folder.
    """
    chosen = combinations(axes)
    configs = [_config(checkpoint, overrides, choice) for choice in chosen]  # errors come before the work
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    with (out / "sweep.jsonl").open("w") as file:
        for choice, config in zip(chosen, configs, strict=True):
            folder = out / ",".join(f"{name}={value}" for name, value in choice.items()).replace("/", "_")
            weights = choice.get(WEIGHTS, "ema")
            if not _there(folder, checkpoint, config, weights):
                named = Path(weights) if weights not in ("ema", "raw") else None
                made = make_samples(WeightSource(checkpoint, weights == "raw", named), config, progress)
                write_samples(folder, *made, config.sample.group_size)
            rows.append({"axes": choice, **measure(folder)})
            file.write(json.dumps(rows[-1]) + "\n")
            file.flush()
    return rows


def _config(checkpoint: Path, overrides: list[str], choice: dict[str, str]) -> Config:
    settings = [*overrides, *(f"{name}={value}" for name, value in choice.items() if name != WEIGHTS)]
    for setting in settings:
        if not _of_sampling(setting.partition("=")[0]):
            raise RunError(f"{setting}: only sample.* can be set here; the rest is what the run was trained with")
    config = fixed(change_config(read_config(checkpoint), settings))
    check_per_class(config.sample)
    return config


def _of_sampling(name: str) -> bool:
    return matches(name, marked(Config, "sampling", "only"))


def _there(folder: Path, checkpoint: Path, config: Config, weights: str) -> bool:
    """Return whether the folder has the samples of these settings; those from a file of weights are always made again,
    because the file may have changed."""
    if weights not in ("ema", "raw") or not (folder / "samples.json").is_file():
        return False
    stored = RECORDED_LATER | json.loads((folder / "samples.json").read_text())
    expected = {
        **json.loads(config.sample.model_dump_json()),
        "checkpoint": str(checkpoint),
        "weights": {"ema": "ema", "raw": "model"}[weights],
    }
    return all(stored.get(name) == value for name, value in expected.items())
