"""One grammar of sweeps in all tools."""

from pathlib import Path

import pytest

from trainer.ablation.runs import plan_cells
from trainer.config.sweeps import combinations, parse_sweep, split_values
from trainer.config.tree import load_sweep
from trainer.errors import RunError
from trainer.sampling.sweep import parse_axes


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1,2,4", ["1", "2", "4"]),
        ("[null,0],[0,null]", ["[null,0]", "[0,null]"]),
        ("{a: [1,2], b: 3},null", ["{a: [1,2], b: 3}", "null"]),
        ("'a,b',\"c,]\",d's,e", ["'a,b'", '"c,]"', "d's", "e"]),
        ("['a,]',1],2", ["['a,]',1]", "2"]),
        ("", [""]),
        ("[1,2", None),
        ("'a,b", None),
    ],
)
def test_commas_split_where_no_bracket_or_quote_is_open(text, values):
    assert split_values(text) == values


@pytest.mark.parametrize("sweep", ["groups.size", "groups.size=", "=1,2", "groups.size=1,,2", "groups.window=[1,2"])
def test_what_is_no_sweep_is_said_with_the_option_of_each_tool(sweep, tmp_path):
    for option, call in {
        "--sweep": lambda: load_sweep("configs/digits.yaml", [], [sweep]),
        "--axis": lambda: plan_cells(Path("configs/digits.yaml"), [], [sweep], 1, tmp_path),
    }.items():
        with pytest.raises(RunError, match=r"write field=value,value, as groups.size=1,2,4") as caught:
            call()
        assert str(caught.value).startswith(f"{option} {sweep}: ")
    with pytest.raises(RunError, match=r"write field=value,value, as sample.guidance"):
        parse_axes([sweep.replace("groups", "sample")])


def test_lists_can_be_swept_in_every_tool(tmp_path):
    sweep = "groups.window=[null,0],[0,null]"
    configs = load_sweep("configs/digits.yaml", [f"run={tmp_path}"], [sweep, "seed=0,1"])
    assert [(c.groups.window, c.seed) for c in configs] == [
        *(((None, 0), seed) for seed in (0, 1)),
        *(((0, None), seed) for seed in (0, 1)),
    ]
    assert Path(configs[0].run) == tmp_path / "groups.window=[null,0],seed=0"
    cells, planned = plan_cells(Path("configs/digits.yaml"), [], [sweep], 1, tmp_path)
    assert [planned[cell.name].groups.window for cell in cells] == [(None, 0), (0, None)]
    assert parse_axes(["sample.interval=[-2,2],null"]) == {"sample.interval": ["[-2,2]", "null"]}


def test_folders_of_a_sweep_are_named_as_they_always_were(tmp_path):
    configs = load_sweep("configs/digits.yaml", [f"run={tmp_path}"], ["groups.size=2,4", "init_from=a/b"])
    assert [Path(c.run).name for c in configs] == ["groups.size=2,init_from=a_b", "groups.size=4,init_from=a_b"]
    (alone,) = load_sweep("configs/digits.yaml", [f"run={tmp_path}"], [])
    assert alone.run == str(tmp_path)


def test_combinations_are_every_choice_the_last_fastest():
    assert combinations({"a": ["1", "2"], "b": ["x", "y"]}) == [
        *({"a": "1", "b": b} for b in "xy"),
        *({"a": "2", "b": b} for b in "xy"),
    ]
    assert parse_sweep("--sweep", "a=1") == ("a", ["1"])
