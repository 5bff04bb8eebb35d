"""What is made from the fields: tables, configs/README.md, schemas; and that our YAML files agree with them."""

import json
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from data.sets.registry import SETS
from models.paths.timesteps import TIMESTEPS
from tests.in_process import call
from tools.describe import DOCUMENTS
from trainer.config.describe import rows, select, table, value_text
from trainer.config.documents import schema
from trainer.config.fields import field_names, walk
from trainer.config.strict_yaml import parse
from trainer.config.tree import Config
from trainer.engines.build import ENGINES
from trainer.sinks import SINKS

FILES = sorted(Path("configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", DOCUMENTS, ids=str)
def test_made_files_are_of_today(path):
    assert path.read_text() == DOCUMENTS[path](), "run: python tools/describe.py"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_every_file_names_its_schema_and_agrees_with_it(path):
    before, _, after = path.read_text().splitlines()[0].partition("$schema=")
    assert before == "# yaml-language-server: "
    schema = json.loads((path.parent / after).read_text())
    Draft202012Validator.check_schema(schema)
    Draft202012Validator(schema).validate(json.loads(json.dumps(parse(path.read_text()))))


@pytest.mark.parametrize(
    "wrong",
    [
        {"seed": "x"},
        {"sed": 1},
        {"optim": {"lr": -1}},
        {"groups": {"variant": "lite"}},
        {"path": "lineal"},
        {"base": 1},
    ],
)
def test_the_schema_refuses_what_is_wrong(wrong):
    schema = json.loads(Path("configs/schema.json").read_text())
    assert not Draft202012Validator(schema).is_valid(wrong)


@pytest.mark.parametrize("width", [80, 100, 200])
def test_the_table_fits_the_terminal_and_has_every_field(width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    lines = call("submit", "--fields").out.splitlines()
    assert max(map(len, lines)) <= width
    names = [line.split()[0] for line in lines if line[:1].strip()]
    assert [name for name in names if name in field_names(Config)] == field_names(Config)


def test_a_field_that_holds_a_key_of_a_dict_shows_the_keys_of_now(monkeypatch):
    monkeypatch.setitem(ENGINES, "toy", ENGINES["single"])
    monkeypatch.setitem(SINKS, "radio", SINKS["progress"])
    kinds = {name: kind for name, kind, *_ in rows(walk(Config))}
    assert kinds["engine"].split(" | ") == [*ENGINES]
    assert kinds["train.sinks"] == f"list of {' | '.join(SINKS)}"
    assert kinds["data.name"].split(" | ") == [*SETS]
    assert kinds["path.timesteps"] == f"{' | '.join(TIMESTEPS)} or null"
    made = json.loads(schema(Config))
    assert made["properties"]["engine"]["enum"] == [*ENGINES] and "keys_of" not in str(made)


def test_a_section_or_a_field_can_be_asked_for(monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    said = call("submit", "--fields", "groups.spread").out
    assert said.splitlines()[2].split()[:5] == ["groups.spread", "number", ">=", "0", "and"]
    assert "0.0" in said and " no " in said and "How far timesteps in a group may lie" in said
    assert {field.name for field in select(Config, "resume")} == {"resume.fallback"}
    assert "yes" in table(select(Config, "train.images"), 100)


def test_an_unknown_prefix_is_answered_with_the_nearest():
    for asked, near in {"groups.spred": "groups.spread", "group": "groups", "spread": "groups.spread"}.items():
        said = call("submit", "--fields", asked, code=1).err
        assert said == f"error: --fields {asked}: no such field or section; did you mean {near}?\n"


def test_defaults_are_shown_as_yaml_has_them():
    values = [None, True, 0.1, [1, 2], (), "", "x", {}]
    assert [value_text(v) for v in values] == ["null", "true", "0.1", "[1, 2]", "[]", '""', "x", "{}"]


def test_an_error_says_what_the_field_is():
    said = call("submit", "configs/digits.yaml", "optim.lr=fast", code=1).err
    assert said.startswith("error: optim.lr=fast: input should be a valid number")
    assert said.endswith("(optim.lr: Learning rate after the warm-up)\n")
