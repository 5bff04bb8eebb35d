"""Fields of the config tree in words: a table for a terminal and one for Markdown."""

import math
import textwrap
from collections.abc import Iterable
from itertools import zip_longest
from typing import Any

from pydantic import BaseModel

from trainer.config.fields import ConfigField, walk, with_keys
from trainer.config.parsing import closest
from trainer.errors import RunError

HEAD = ("field", "type", "default", "may change", "what it is")
NARROWEST = 16  # characters for the description of a field
NAMES = {"integer": "integer", "number": "number", "boolean": "true | false", "null": "null", "object": "a dict"}


def select(model: type[BaseModel], prefix: str) -> list[ConfigField]:
    """Return the fields of a section (`groups`), or the field of that name; all for "". Raise RunError, which suggests
    the nearest name, if there are none."""
    fields = list(walk(model))
    found = [f for f in fields if not prefix or f.name == prefix or f.name.startswith(f"{prefix.rstrip('.')}.")]
    if not found:
        sections = {f.name.rpartition(".")[0] for f in fields} - {""}
        near = closest(prefix, [*sections, *(f.name for f in fields)])
        raise RunError(f"--fields {prefix}: no such field or section; did you mean {near}?")
    return found


def rows(fields: Iterable[ConfigField]) -> list[tuple[str, ...]]:
    """Return a row of text, with the columns of HEAD, for each field."""
    schemas: dict[type[BaseModel], dict] = {}
    made = []
    for field in fields:
        if field.owner not in schemas:
            schemas[field.owner] = field.owner.model_json_schema()["properties"]
        schema = with_keys(schemas[field.owner][field.name.rpartition(".")[2]])
        kind = type_text(schema, bool(field.marks.get("path")))
        default = "required" if field.info.is_required() else value_text(field.info.default)
        owners = f"Of {' and '.join(field.choices)}: " * bool(field.choices)
        may_change = "yes" if field.marks.get("may_change") else "no"
        made.append((field.name, kind, default, may_change, owners + field.text))
    return made


def table(fields: Iterable[ConfigField], width: int) -> str:
    """Return the fields as a table for a terminal `width` columns wide."""
    lines = [HEAD, *rows(fields)]
    name, kind, default = (max(len(line[i]) for line in lines) for i in range(3))
    kind, default = min(kind, max(12, width // 6)), min(default, max(10, width // 10))
    widths = [name, kind, default, 6, max(NARROWEST, width - name - kind - default - 6 - 8)]
    texts = []
    for line in lines:
        cells = [textwrap.wrap(cell, columns) or [""] for cell, columns in zip(line, widths, strict=True)]
        for parts in zip_longest(*cells, fillvalue=""):
            texts.append("  ".join(f"{part:{columns}}" for part, columns in zip(parts, widths, strict=True)).rstrip())
    return "\n".join([*texts, "", "may change: whether a run may continue with another value."])


def markdown(fields: Iterable[ConfigField]) -> str:
    """Return the fields as a table of Markdown."""
    lines = [HEAD, ("---",) * len(HEAD), *((f"`{name}`", *rest) for name, *rest in rows(fields))]
    return "".join(f"| {' | '.join(cell.replace('|', 'or') for cell in line)} |\n" for line in lines)


def type_text(schema: dict[str, Any], path: bool = False) -> str:
    """Return in words which values a JSON schema allows."""
    if "enum" in schema:
        return " | ".join(str(value) for value in schema["enum"])
    if "const" in schema:
        return str(schema["const"])
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(type_text(part, path) for part in schema["anyOf"]))
    kind = schema.get("type")
    if kind == "array" and "prefixItems" in schema:
        return f"[{', '.join(type_text(part, path) for part in schema['prefixItems'])}]"
    if kind == "array":
        return f"list of {type_text(schema.get('items', {}), path)}"
    if kind == "string":
        return "path" if path else "text"
    return NAMES.get(str(kind), "anything") + _range(schema)


def _range(schema: dict[str, Any]) -> str:
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    known = [
        f"{sign} {schema[name]:.10g}" for name, sign in bounds.items() if math.isfinite(schema.get(name, math.inf))
    ]
    return f" {' and '.join(known)}" if known else ""


def value_text(value: object) -> str:
    """Return a default as it is written in YAML."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(value_text, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return '""' if value == "" else str(value)
