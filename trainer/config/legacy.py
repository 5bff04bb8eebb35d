"""Fields of older configs that have been renamed or dropped.

To rename or drop a field, add a line to the table. Stored configs (of run folders, checkpoints and exported files) are
then read as before. So are renamed fields in a user's YAML file; on the command line, the old name is an error that
gives the new one.
"""

from collections.abc import Callable
from copy import deepcopy
from typing import NamedTuple

RENAMED: dict[str, str] = {"train.score_every": "train.attention_every"}
"""Old dotted name -> new one."""


class Dropped(NamedTuple):
    """A field that is ignored in stored configs if `unused`, given the whole tree, says that it had no effect."""

    name: str
    unused: Callable[[dict], bool]


def _not_jit(tree: dict) -> bool:
    return (tree.get("model") or {}).get("backbone", "dit") != "jit"


def _on_another_path_than(name: str) -> Callable[[dict], bool]:
    return lambda tree: (tree.get("path") or {}).get("name", "linear") != name


DROPPED = (
    Dropped("model.bottleneck", _not_jit),  # 0.1 wrote the fields of all backbones
    Dropped("model.context_tokens", _not_jit),
    Dropped("model.context_start", _not_jit),
    Dropped("path.learns_variance", _on_another_path_than("ddpm")),  # and those of all paths
    Dropped("path.noise_scale", _on_another_path_than("jit")),
)


def upgrade(tree: dict) -> dict:
    """Return the tree of a stored config with today's fields."""
    upgraded = rename(tree)
    for name, unused in DROPPED:
        if unused(tree):
            _take(upgraded, name)
    return upgraded


def rename(tree: dict) -> dict:
    """Return the tree with today's field names."""
    upgraded = deepcopy(tree)
    for old, new in RENAMED.items():
        if (found := _take(upgraded, old)) is not None:
            *parents, leaf = new.split(".")
            section = upgraded
            for parent in parents:
                section = section.setdefault(parent, {})
            section[leaf] = found[0]
    return upgraded


def _take(tree: dict, name: str) -> tuple[object] | None:
    """Remove a field from the tree and return its value in a tuple; None if it is not there."""
    *parents, leaf = name.split(".")
    for parent in parents:
        section = tree.get(parent)
        if not isinstance(section, dict):
            return None
        tree = section
    return (tree.pop(leaf),) if leaf in tree else None
