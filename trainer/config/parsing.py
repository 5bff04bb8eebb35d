"""From text to a tree of plain values and back: YAML with `base:`, dotted overrides, one-line errors."""

import difflib
import re
from collections.abc import Container
from pathlib import Path

import pydantic
from pydantic import BaseModel

from trainer.config.legacy import RENAMED
from trainer.config.strict_yaml import YamlError, dump, parse
from trainer.errors import RunError


def read_yaml(path: Path, texts: Container[str] = (), above: tuple[Path, ...] = ()) -> dict:
    """Return the tree of a config file, merged over those of its `base:`: one path relative to the file, or several
    (later ones win). `texts` are the names of fields that hold text."""
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        hint = f"did you mean {path.parent / near[0]}?" if near else "give a YAML file, as configs/digits.yaml"
        raise RunError(f"{path}: no such config file; {hint}")
    if path.resolve() in above:
        raise RunError(f"{path}: base={path.name} leads back to itself; remove one `base:`")
    tree = read_fields(path, texts)
    bases = tree.pop("base", [])
    merged: dict = {}
    for base in bases if isinstance(bases, list) else [bases]:
        merged = _merge(merged, read_yaml(path.parent / str(base), texts, (*above, path.resolve())))
    return _merge(merged, tree)


def read_fields(path: Path, texts: Container[str] = (), example: str = "seed: 0") -> dict:
    """Return the fields of a YAML file, with their values. Raise RunError, which names the file and the line, if they
    cannot be read."""
    try:
        tree = parse(path.read_text("utf-8-sig"), texts)
    except (YamlError, UnicodeDecodeError) as error:
        raise RunError(f"{path}: {'not YAML: ' * isinstance(error, UnicodeDecodeError)}{error}") from None
    if not isinstance(tree, dict | None):
        raise RunError(f"{path}: holds a {type(tree).__name__}; it must hold fields, as `{example}`")
    return tree or {}


def _merge(base: dict, over: dict) -> dict:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def set_dotted(tree: dict, override: str, texts: Container[str] = ()) -> None:
    """Apply `a.b=value` to the tree. The value is read as YAML, except in the fields `texts`, which hold text."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RunError(f"{override}: not an override; write field=value, as optim.lr=2e-4")
    try:
        value = parse(text, texts, key)
    except YamlError as error:
        raise RunError(f"{override}: {error}") from None
    *parents, leaf = key.split(".")
    for parent in parents:
        if not isinstance(tree.setdefault(parent, {}), dict):
            raise RunError(f"{override}: {parent} is a single value; it has no field {leaf}")
        tree = tree[parent]
    tree[leaf] = value


def to_yaml(config: BaseModel) -> str:
    """Return the resolved tree as YAML, every field with its value."""
    return dump(config.model_dump(mode="json"))


def dotted(tree: dict, prefix: str = "") -> dict[str, object]:
    """Flatten a tree: {"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, object] = {}
    for key, value in tree.items():
        inner = isinstance(value, dict) and value
        flat.update(dotted(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value})
    return flat


def explain(error: pydantic.ValidationError, fields: dict[str, str]) -> str:
    """Return the first error as `field=value: what is wrong; fix`, and the field's description. `fields` holds the
    descriptions of all fields by name."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        if place in RENAMED:
            return f"{place}={first['input']}: is now {RENAMED[place]}; set that"
        return f"{place}={first['input']}: no such field; did you mean {closest(place, list(fields))}?"
    if first["type"] == "missing":
        return f"{place}: missing; set it{_hint(place, fields)}"
    if first["type"] == "value_error":  # raised by our own validators: the message names the rest of the place
        message = ".".join(filter(None, (place, str(first.get("ctx", {})["error"]))))
        return message + _hint(message.partition("=")[0], fields)
    if first["type"] in ("model_type", "model_attributes_type"):
        inside = next((name for name in fields if name.startswith(f"{place}.")), place)
        return f"{place}={first['input']}: is a section of fields; set one of them, as {inside}=..."
    expected = first["msg"][0].lower() + first["msg"][1:]
    return f"{place}={first['input']}: {expected}{_hint(place, fields)}"


def _hint(place: str, fields: dict[str, str]) -> str:
    """Return the first sentence of the description of the field at `place`, if there is one."""
    name = next((name for name in fields if place == name or place.startswith(f"{name}.")), None)
    return f" ({name}: {re.split(r'[.;] ', fields[name])[0].rstrip('.')})" if name and fields[name] else ""


def closest(name: str, known: list[str]) -> str:
    """Return the most similar known name; a correct last part in the wrong place counts as most similar."""
    leaf = name.rpartition(".")[2]
    same_leaf = [k for k in known if k.rpartition(".")[2] == leaf]
    return difflib.get_close_matches(name, same_leaf or known, n=1, cutoff=0.0)[0]
