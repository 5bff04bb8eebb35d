"""The ablation tool on runs of a few steps, whole and killed."""

import json
import os
import random
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from tests.patience import PATIENCE
from tests.trainer.forked import TINY
from trainer.ablation.gains import gain, shown
from trainer.ablation.runs import Cell, at_real_accuracy, correlations, plan_cells, s_cross, summarise, table
from trainer.checkpoints.weights import WeightSource
from trainer.config.tree import load_config
from trainer.errors import RunError

WHAT = [TINY, "train.images=64", "checkpoint.every=32", "groups.size=4", "groups.splits=4", "sample.per_class=3"]
HOW = ["--axis", "groups.size=1,4", "--axis", "groups.query=similarity,random", "--seeds", "2", "--guidance", "1,2"]
MEASURES = ("frechet", "precision", "recall", "class_accuracy", "guidance")


@pytest.fixture(scope="module")
def whole(tool, tmp_path_factory):
    """An ablation that nothing stopped, in one process."""
    out = tmp_path_factory.mktemp("ablation")
    return out, tool("ablate", *WHAT, *HOW, "--out", out)


def test_runs_that_two_axes_share_are_made_once(whole):
    out, said = whole
    made = {path.name for path in out.glob("*seed=*.json")}
    own = ("query=random", "size=1", "size=4")  # query=similarity is size=4, as the config has both
    assert made == {f"groups.{value},seed={seed}.json" for value in own for seed in (0, 1)}
    rows = json.loads((out / "ablation.json").read_text())["rows"]
    assert [(row["axis"], row["value"]) for row in rows] == [
        ("groups.size", "1"),
        ("groups.size", "4"),
        ("groups.query", "similarity"),
        ("groups.query", "random"),
    ]
    assert said.out.startswith((out / "ablation.md").read_text()) and (out / "ablation.svg").stat().st_size > 10_000


def test_each_row_is_mean_and_deviation_of_its_seeds(whole):
    out, _ = whole
    rows = json.loads((out / "ablation.json").read_text())["rows"]
    for row in (row for row in rows if row["value"] != "similarity"):  # which has no files of its own
        runs = [json.loads((out / f"{row['axis']}={row['value']},seed={seed}.json").read_text()) for seed in (0, 1)]
        best = [min(run["curve"], key=lambda point: point["frechet"]) for run in runs]
        for name in MEASURES:
            values = [point[name] for point in best]
            assert row["best"][name] == pytest.approx([np.mean(values), np.std(values, ddof=1)]), name
        assert [point["guidance"] for point in runs[0]["curve"]] == [1, 2]
        measured = [run["s_cross"] for run in runs]
        assert (row["s_cross"] is None) == (row["value"] == "1") == (measured == [None, None])
    apart = {"axis": "", "value": "", "gain": ""}
    assert rows[1] | apart == rows[2] | apart


def test_each_row_has_its_gain_over_the_first_value_of_its_axis_seed_by_seed(whole):
    out, said = whole
    rows = json.loads((out / "ablation.json").read_text())["rows"]
    assert [row["gain"] and row["gain"]["over"] for row in rows] == [None, "1", None, "similarity"]
    distances = {}
    for value in ("size=1", "size=4"):
        runs = [json.loads((out / f"groups.{value},seed={seed}.json").read_text()) for seed in (0, 1)]
        distances[value] = np.array([[point["frechet"] for point in run["curve"]] for run in runs])
    for found, chosen in (
        (rows[1]["gain"]["best"], [each.min(axis=1) for each in distances.values()]),
        (rows[1]["gain"]["curve"][0], [each[:, 0] for each in distances.values()]),
    ):
        assert found == gain(*chosen)
        assert found["mean"] == pytest.approx(chosen[0].mean() - chosen[1].mean())
    assert shown(rows[1]["gain"]["best"]) in (out / "ablation.md").read_text() and "gain (unpaired)" in said.out


def test_seeds_and_values_make_different_runs(whole):
    out, _ = whole
    curves = [path.read_text() for path in out.glob("*seed=*.json")]
    assert len(set(curves)) == len(curves) == 6


def test_one_that_is_killed_half_way_goes_on_and_gives_the_same_table(whole, tool, start_tool, tmp_path):
    """Two processes, killed with all they have started, at two random times."""
    expected, said = whole
    command = ["ablate", *WHAT, *HOW, "--procs", "2", "--out", tmp_path]
    for wanted in sorted(random.sample(range(1, 6), 2)):
        process = start_tool(*command, start_new_session=True)
        end = time.monotonic() + PATIENCE
        while len(list(tmp_path.glob("*seed=*.json"))) < wanted and time.monotonic() < end and process.poll() is None:
            time.sleep(0.05)
        time.sleep(random.random())
        _kill_all(process)
    assert not (tmp_path / "ablation.json").exists()
    found = tool(*command)
    assert (tmp_path / "ablation.json").read_bytes() == (expected / "ablation.json").read_bytes()
    assert said.out in found.out


def _kill_all(process):
    """The tool and its processes, which submitit starts in sessions of their own."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(re.sub(r".*\) \S ", "", stat.read_text()).split()[0])
        except (FileNotFoundError, ProcessLookupError):
            continue
    doomed, size = {process.pid}, 0
    while size != len(doomed):
        size = len(doomed)
        doomed |= {child for child, parent in parents.items() if parent in doomed}
    for pid in doomed:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.communicate()


@pytest.mark.parametrize(
    ("changes", "message"),
    [(["--guidance", "2"], "--guidance=[2.0]: "), (["train.images=32"], "train.images=32: "), (["seed=5"], None)],
)
def test_results_of_other_settings_are_not_mixed_in(whole, tool, changes, message):
    out, _ = whole
    before = {path: path.read_bytes() for path in out.iterdir() if path.is_file()}
    said = tool("ablate", *WHAT, *HOW, *changes, "--out", out, code=1 if message else 0).err
    if message:
        error = said.splitlines()[-1]
        assert error.startswith(f"error: {message}") and "was made with" in error and "give another --out" in error
    assert {path: path.read_bytes() for path in out.iterdir() if path.is_file()}.keys() == before.keys()
    assert all(path.read_bytes() == before[path] for path in before if path.name != "ablation.svg")


def test_a_run_whose_layers_share_nothing_has_no_s_cross():
    config = load_config(TINY, ["groups.size=4", "model.group_layers=[]", "run=unused"])
    assert s_cross(WeightSource(Path("nowhere")), config) is None


@pytest.mark.parametrize(
    ("axis", "message"),
    [
        ("groups.size", "--axis groups.size: write field=value,value"),
        ("groups.size=", "--axis groups.size=: write field=value,value"),
        ("groups.sizes=1,2", "groups.sizes"),
        ("groups.size=1,64", "groups.size=64"),
    ],
)
def test_bad_axes_are_one_line_and_nothing_is_written(tool, tmp_path, axis, message):
    said = tool("ablate", *WHAT, "--axis", axis, "--out", tmp_path / "out", code=1).err
    assert said.startswith("error: ") and message in said and said.count("\n") == 1, said
    assert not (tmp_path / "out").exists()


def test_a_weight_of_guidance_that_is_no_number_is_refused(tool, tmp_path):
    said = tool("ablate", *WHAT, "--axis", "groups.size=1", "--guidance", "1,x", "--out", tmp_path / "out", code=2).err
    assert "argument --guidance: invalid numbers value: '1,x'" in said and not (tmp_path / "out").exists()


def test_values_in_brackets_are_one_value():
    cells, configs = plan_cells(TINY, [], ["groups.window=null,[null,0],[-1.5,2]"], 1, Path("out"))
    assert [cell.value for cell in cells] == ["null", "[null,0]", "[-1.5,2]"]
    assert [config.groups.window for config in configs.values()] == [None, (None, 0), (-1.5, 2)]


def test_the_correlation_is_over_the_rows_that_have_s_cross(tmp_path):
    rng, cells, points = np.random.default_rng(), [], []
    for number in range(5):
        frechet, measured = rng.random(2).tolist()
        name = f"run-{number}"
        point = {"frechet": frechet, "guidance": 1.0, "class_accuracy": 0.5, "heldout_accuracy": 0.9}
        run = {"curve": [point], "s_cross": measured if number else None}
        (tmp_path / f"{name}.json").write_text(json.dumps(run))
        cells.append(Cell("axis", str(number), 0, name))
        points += [(measured, frechet)] if number else []
    rows = summarise(cells, tmp_path)
    assert correlations(rows) == {"w=1": pytest.approx(np.corrcoef(np.array(points).T)[0, 1])}
    assert correlations(rows[:3]) == {}, "of two points there is none"


def test_the_table_shows_the_best_point_of_each_curve(tmp_path):
    points = [
        {"frechet": f, "guidance": w, "class_accuracy": a, "precision": 0.25, "recall": 0.75, "heldout_accuracy": 0.9}
        for f, w, a in ((3.0, 1.0, 0.8), (2.0, 1.5, 0.85), (4.0, 2.0, 0.95), (6.0, 3.0, 0.92))
    ]
    (tmp_path / "run.json").write_text(json.dumps({"curve": points, "s_cross": 0.02}))
    lines = table(summarise([Cell("groups.size", "4", 0, "run")], tmp_path)).splitlines()
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert cells[:5] == ["`groups.size`", "4", "2.00 ± 0.00", "", "1.5 ± 0.0"]
    assert cells[-2:] == ["3.00 ± 0.00", "2.0 ± 0.0 %"], "half way from 85 to 95 % is the accuracy of real images"


def test_the_distance_at_real_accuracy_is_on_the_line_between_the_points_around_it():
    rng = np.random.default_rng()
    accuracy, frechet = np.sort(rng.random(5)), rng.random(5)
    real = float(rng.uniform(accuracy[0], accuracy[-1]))
    curve = [
        {"class_accuracy": a, "frechet": f, "heldout_accuracy": real} for a, f in zip(accuracy, frechet, strict=True)
    ]
    assert at_real_accuracy(curve) == pytest.approx(np.interp(real, accuracy, frechet))
    assert at_real_accuracy(curve[:1]) is None
    assert at_real_accuracy([point | {"heldout_accuracy": 1.0} for point in curve]) is None


def test_a_config_that_no_axis_fits_is_named():
    with pytest.raises(RunError, match=r"groups\.size=3"):
        plan_cells(TINY, ["train.micro_batch=4"], ["groups.size=3"], 1, Path("out"))
