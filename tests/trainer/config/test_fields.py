"""What fields say of themselves: docstrings and marks."""

from trainer.config.fields import field_names, marked, matches, walk
from trainer.config.tree import Config


def test_every_field_says_what_it_is():
    for field in walk(Config):
        text = field.info.description or ""
        assert text[:1].isupper() or text.startswith("none:") or text.startswith("by_step:"), field.name
        assert text.endswith("."), field.name


def test_marks_say_what_may_change_when_a_run_continues():
    """The names that were once a list of the run folder's."""
    expected = (
        "run",
        "engine",
        "zero",
        "shard_size",
        "offload",
        "activation_checkpointing",
        "compile",
        "train.images",
        "train.micro_batch",
        "train.log_every",
        "train.sample_every",
        "train.attention_every",
        "train.sinks",
        "train.timeout",
        "data.workers",
    )
    sections = ("deepspeed", "checkpoint.", "resume.", "sample.", "evaluate.")
    free = marked(Config, "may_change", True)
    for name in [*field_names(Config), "deepspeed.steps_per_print"]:
        assert matches(name, free) == (name in expected or name.startswith(sections)), name


def test_marks_say_what_no_result_depends_on():
    expected = ("run", "checkpoint.", "resume.", "data.workers", "train.log_every", "train.sinks", "train.timeout")
    free = marked(Config, "affects_results", False)
    for name in field_names(Config):
        assert matches(name, free) == name.startswith(expected), name


def test_marks_say_what_describes_sampling():
    assert marked(Config, "sampling", "only") == ["sample."]
    assert sorted(marked(Config, "sampling", "only", "also")) == ["data.", "model.group_layers", "precision", "sample."]


def test_marks_say_what_is_a_path():
    assert {field.name for field in walk(Config) if field.marks.get("path")} == {
        *("run", "init_from", "data.latents", "data.pixels", "data.neighbors", "data.vae"),
        *("evaluate.detector", "evaluate.reference", "sample.weaker", "sample.small"),
    }


def test_a_name_matches_fields_sections_and_keys_but_not_their_beginnings():
    assert matches("sample.steps", ["sample."]) and matches("deepspeed.a.b", ["deepspeed"])
    assert not matches("runs", ["run"]) and not matches("sample", ["sample."])
