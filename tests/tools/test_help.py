"""Every tool's help: each option that takes a value says its default, and values have the same names in all tools."""

import re
from pathlib import Path

import pytest

from tests.in_process import call

TOOLS = sorted(path.stem for path in Path("tools").glob("*.py") if "run_tool(" in path.read_text())
TOOLS.remove("command_line")
VALUES = {"FOLDER", "FILE", "RUN", "N", "N,N", "NAME", "NAME,NAME", "field=value", "field=a,b,c", "[field]"}
OPTION = re.compile(r"  (--[a-z-]+) (\S+|GROUP IMAGE ROW COLUMN)  +(.*)")


@pytest.mark.parametrize("name", TOOLS)
def test_each_option_says_its_default(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    said = call(name, "--help").out
    usage = said.partition("\n\n")[0]
    for option, value, about in OPTION.findall(said):
        assert "default: " in about or f"[{option} " not in usage, option
        assert value in VALUES or "{" in value or " " in value, option


def test_the_readme_has_a_row_for_each_tool():
    rows = re.findall(r"^\| (\w+)\.py \|", Path("tools/README.md").read_text(), re.M)
    assert sorted(rows) == sorted([*TOOLS, "bench", "describe"])
