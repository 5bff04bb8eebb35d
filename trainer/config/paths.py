"""Expand `~` and environment variables in the config fields that are paths."""

import os
import re
from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path

from trainer.errors import RunError


def expand_paths(tree: dict, names: Iterable[str]) -> dict:
    """Return a copy of a config's tree with `~`, `$VARIABLE` and `${VARIABLE}` replaced in the fields `names`. Raise
    RunError for a variable that is not set."""
    tree = deepcopy(tree)
    for name in names:
        *parents, leaf = name.split(".")
        section = tree
        for parent in parents:
            section = section.get(parent) if isinstance(section, dict) else None
        if isinstance(section, dict) and isinstance(section.get(leaf), str):
            section[leaf] = _expanded(name, section[leaf])
    return tree


def _expanded(name: str, value: str) -> str:
    def variable(found: re.Match) -> str:
        if (known := os.environ.get(found[1] or found[2])) is None:
            raise RunError(f"{name}={value}: {found[0]} is not set; set it, or write the path in full")
        return known

    path = re.sub(r"\$(?:(\w+)|\{(\w+)\})", variable, value)
    try:
        return str(Path(path).expanduser()) if path.startswith("~") else path
    except RuntimeError:
        raise RunError(f"{name}={value}: there is no such user; write the path in full") from None
