"""Sample one checkpoint with every combination of some sampling settings, measure each, and make a table."""

import json
from collections.abc import Callable
from pathlib import Path

from trainer.checkpoints.weights import WeightSource, find_source
from trainer.config.fields import marked, matches
from trainer.config.sweeps import combinations, parse_sweep
from trainer.config.tree import Config, change_config
from trainer.errors import RunError
from trainer.run_folder import read_config
from trainer.sampling.labels import check_per_class
from trainer.sampling.networks import fixed
from trainer.sampling.samples import RECORDED_LATER, make_samples, write_samples

WEIGHTS = "weights"  # the axis of the weights: averages, raw, or files, like those of tools/reconstruct_ema.py
Axes = dict[str, list[str]]  # values of each swept setting


def parse_axes(sweeps: list[str]) -> Axes:
    """Parse sweeps like `sample.guidance=1,1.5,2`. Raise RunError for a field that is not a sampling setting."""
    axes = {}
    for sweep in sweeps:
        name, values = parse_sweep("--sweep", sweep, "sample.guidance=1,1.5,2")
        if name != WEIGHTS and not _of_sampling(name):
            raise RunError(
                f"--sweep {sweep}: only sample.* and {WEIGHTS} (ema, ema_<decay>, raw, a file) can be swept here"
            )
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
    sources = [find_source(checkpoint, choice.get(WEIGHTS)) for choice in chosen]
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    with (out / "sweep.jsonl").open("w") as file:
        for choice, config, source in zip(chosen, configs, sources, strict=True):
            folder = out / ",".join(f"{name}={value}" for name, value in choice.items()).replace("/", "_")
            if not _there(folder, config, source):
                made = make_samples(source, config, progress)
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


def _there(folder: Path, config: Config, source: WeightSource) -> bool:
    """Return whether the folder has the samples of these settings; those from a file of weights are always made again,
    because the file may have changed."""
    if source.file or not (folder / "samples.json").is_file():
        return False
    stored = RECORDED_LATER | json.loads((folder / "samples.json").read_text())
    expected = {
        **json.loads(config.sample.model_dump_json()),
        "checkpoint": str(source.checkpoint),
        "weights": source.weights,
    }
    return all(stored.get(name) == value for name, value in expected.items())
