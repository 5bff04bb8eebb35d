"""YAML means what it looks like: in files, overrides, sweeps and stored configs."""

import random

import pytest
import yaml

from trainer.config.fields import text_fields
from trainer.config.strict_yaml import YamlError, dump, parse
from trainer.config.tree import Config, load_config, load_sweep, stored_config
from trainer.errors import RunError


def of_file(tmp_path, text, *overrides, raw=None):
    path = tmp_path / "some.yaml"
    path.write_bytes(raw if raw is not None else text.encode())
    return load_config(path, list(overrides))


def refusal(call, *arguments, **named):
    with pytest.raises(RunError) as caught:
        call(*arguments, **named)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_key_given_twice_is_an_error_that_names_it_and_the_lines(tmp_path):
    text = "optim:\n  lr: 1.0e-3\nseed: 1\noptim:\n  warmup: 5\n"
    assert "some.yaml: optim: given twice, in lines 1 and 4; keep one" in refusal(of_file, tmp_path, text)
    assert "optim.lr: given twice, in lines 2 and 3" in refusal(of_file, tmp_path, "optim:\n  lr: 1\n  lr: 2\n")
    assert "optim.lr: given twice" in refusal(of_file, tmp_path, "", "optim={lr: 1, lr: 2}")
    assert "model.depth: given twice" in refusal(stored_config, "run: x\nmodel: {depth: 1, depth: 2}\n")


@pytest.mark.parametrize(
    ("written", "value"), [("010", 10), ("08", 8), ("6_400", 6400), ("1e3", 1000), ("+7", 7), ("0", 0)]
)
def test_whole_numbers_are_decimal(tmp_path, written, value):
    assert of_file(tmp_path, f"optim: {{warmup: {written}}}").optim.warmup == value
    assert of_file(tmp_path, "", f"optim.warmup={written}").optim.warmup == value
    assert stored_config(f"run: x\noptim: {{warmup: {written}}}").optim.warmup == value
    (swept,) = load_sweep("configs/digits.yaml", [f"run={tmp_path}"], [f"optim.warmup={written}"])
    assert swept.optim.warmup == value


@pytest.mark.parametrize("written", ["1e-4", "1.0e-4", "1E-4", ".0001", "0.000_1".replace("_", "")])
def test_a_number_needs_no_dot(tmp_path, written):
    assert of_file(tmp_path, f"optim: {{lr: {written}}}").optim.lr == 1e-4
    assert of_file(tmp_path, "", f"optim.lr={written}").optim.lr == 1e-4


@pytest.mark.parametrize("written", ["1:30", "0x10", "0o17", "1.2.3", "1,5"])
def test_what_only_resembles_a_number_is_none(tmp_path, written):
    assert "optim.warmup=" in refusal(of_file, tmp_path, f"optim:\n  warmup: {written}\n")
    assert "optim.warmup=" in refusal(of_file, tmp_path, "", f"optim.warmup={written}")


@pytest.mark.parametrize("written", ["on", "Off", "YES", "no"])
def test_other_words_for_true_and_false_are_refused(tmp_path, written):
    meant = "true" if written.lower() in ("on", "yes") else "false"
    said = refusal(of_file, tmp_path, f"seed: 1\ncompile: {written}\n")
    assert f"some.yaml: compile={written}: line 2 may be misread; write {meant}, or '{written}'" in said
    assert f"write {meant}" in refusal(of_file, tmp_path, "", f"compile={written}")
    assert f"write {meant}" in refusal(load_sweep, "configs/digits.yaml", [], [f"compile={written},true"])
    assert of_file(tmp_path, "compile: true").compile and not of_file(tmp_path, "", "compile=False").compile


@pytest.mark.parametrize("written", ["42", "007", "1e3", "1.50", "on", "no", "true", "2024-01-01", "1:30", "-0"])
def test_text_stays_as_it_is_written(tmp_path, written):
    assert of_file(tmp_path, f"run: {written}").run == written
    assert of_file(tmp_path, "", f"run={written}").run == written
    assert of_file(tmp_path, f"init_from: {written}").init_from == written
    assert of_file(tmp_path, "", f"evaluate.metrics=[fid,{written}]").evaluate.metrics == ("fid", written)
    assert of_file(tmp_path, "", "init_from=null").init_from is None
    assert stored_config(dump({"run": written, "init_from": written})).init_from == written


def test_paths_expand_home_and_variables(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("SCRATCH", "/scratch")
    monkeypatch.delenv("NOTHING", raising=False)
    assert of_file(tmp_path, "run: ~/runs/a\ninit_from: $SCRATCH/b").run == "/home/someone/runs/a"
    assert of_file(tmp_path, "", "init_from=${SCRATCH}/b/$HOME").init_from == "/scratch/b//home/someone"
    for field in ("data.latents", "data.neighbors", "data.vae"):
        config = of_file(tmp_path, "", "data.name=latents", "data.latents=x", f"{field}=~/l")
        section, leaf = field.split(".")
        assert getattr(getattr(config, section), leaf) == "/home/someone/l"
    for field in ("sample.weaker", "sample.small", "init_from"):
        assert "$NOTHING is not set" in refusal(of_file, tmp_path, "", f"{field}=$NOTHING/x")
    assert "no such user" in refusal(of_file, tmp_path, "", "run=~nobody_of_this_name/x")
    name = "stabilityai/sd-vae-ft-ema"
    assert of_file(tmp_path, "", "data.name=latents", "data.latents=x", f"data.vae={name}").data.vae == name
    assert of_file(tmp_path, "", "run=a//b~/./c").run == "a//b~/./c", "nothing else changes"


def test_byte_order_marks_and_carriage_returns_are_read(tmp_path):
    config = of_file(tmp_path, "", raw=b"\xef\xbb\xbfseed: 3\r\noptim:\r\n  lr: 1e-4\r\n")
    assert (config.seed, config.optim.lr) == (3, 1e-4)


def test_what_is_no_yaml_is_named_with_its_line(tmp_path):
    assert "some.yaml: not YAML: line 3: a tab; indent with spaces" in refusal(
        of_file, tmp_path, "seed: 1\noptim:\n\tlr: 1\n"
    )
    assert "some.yaml: not YAML: line 3" in refusal(of_file, tmp_path, "seed: 1\na: [1\n")
    assert "some.yaml: not YAML" in refusal(of_file, tmp_path, "", raw=b"run: \xff\xfe")
    assert "some.yaml: not YAML" in refusal(of_file, tmp_path, "run: a\x00b")
    assert "line 1: a key must be a word" in refusal(of_file, tmp_path, "[a, b]: 1")
    assert "optim.lr=[1: not YAML" in refusal(of_file, tmp_path, "", "optim.lr=[1")


def test_anchors_and_merges_are_read():
    assert parse("a: &x {b: 1, c: 2}\nd:\n  <<: *x\n  b: 3\n") == {"a": {"b": 1, "c": 2}, "d": {"c": 2, "b": 3}}


def test_nothing_is_executed():
    with pytest.raises(YamlError):
        parse("a: !!python/object/apply:os.system ['true']")


def test_what_is_written_reads_back_the_same():
    rng = random.SystemRandom()
    odd = [
        "on",
        "010",
        "1e-4",
        "1:30",
        "~",
        "",
        "null",
        "a: b",
        "- x",
        "<<",
        "0x1",
        "é",
        " x ",
        "true",
        "3",
        "1_0",
        "#",
    ]
    values = [*odd, 1e-4, 1e300, float("inf"), 7, -3, True, False, None, 0.1]
    for _ in range(50):
        tree = {f"k{i}": rng.choice([*values, {"a": rng.choice(values)}, [rng.choice(values)]]) for i in range(9)}
        assert parse(dump(tree)) == tree
        assert parse(yaml.safe_dump(tree | {"e": "e"}))["e"] == "e", "as older versions wrote it"


def test_text_fields_are_those_that_hold_text():
    texts = text_fields(Config)
    assert {"run", "data.vae", "evaluate.metrics[]", "groups.variant", "model.size"} <= texts
    assert not {"seed", "optim.betas", "compile", "deepspeed", "groups.window", "zero"} & texts
