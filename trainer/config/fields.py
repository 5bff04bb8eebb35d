"""The fields of the config tree, with the docstring, type, default and marks that their classes give them.

A mark is a key of `json_schema_extra`, of a field or of its whole class:
- may_change: true where a run may continue with another value.
- affects_results: false where no result depends on the value.
- sampling: "only" where it describes sampling and nothing else, "also" where sampling may differ from training.
- path: true where the value is the path of a file or folder.
- keys_of: "module:NAME" of the dict whose keys the value, or each of its values, may be.
"""

import importlib
from collections.abc import Iterable, Iterator
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from models.choice import OneOf, Sections


class ConfigField(NamedTuple):
    """A field that holds a value: its dotted name, how its class declares it, and its marks."""

    name: str
    info: FieldInfo
    marks: dict[str, Any]
    owner: type[BaseModel]
    choices: tuple[str, ...] = ()  # the section's choices that have the field; (): all

    @property
    def text(self) -> str:
        """Return the field's description on one line."""
        return " ".join((self.info.description or "").split())


def walk(model: type[BaseModel], prefix: str = "", above: dict[str, Any] | None = None) -> Iterator[ConfigField]:
    """Yield every field of a config class and of its sections, in order."""
    marks = {**(above or {}), **_marks(model.model_config.get("json_schema_extra"))}
    for name, info in model.model_fields.items():
        own = {**marks, **_marks(info.json_schema_extra)}
        section, place = info.annotation, prefix + name
        sections = next((mark for mark in info.metadata if isinstance(mark, Sections)), None)
        choice = next((mark for mark in info.metadata if isinstance(mark, OneOf)), None)
        if choice:
            yield from _of_choices(choice.configs(), f"{place}.", own)
        elif sections:
            for key, inner in sections.classes().items():
                yield from walk(inner, f"{place}.{key}.", own)
        elif isinstance(section, type) and issubclass(section, BaseModel):
            yield from walk(section, f"{place}.", own)
        else:
            yield ConfigField(place, info, own, model)


def _of_choices(configs: dict[str, type[BaseModel]], prefix: str, marks: dict[str, Any]) -> Iterator[ConfigField]:
    """Yield each field of any choice once, as the first choice declares it, with the choices that have it."""
    walked = {
        choice: {field.name: field for field in walk(config, prefix, marks)} for choice, config in configs.items()
    }
    for name in dict.fromkeys(name for fields in walked.values() for name in fields):
        owners = tuple(choice for choice, fields in walked.items() if name in fields)
        yield walked[owners[0]][name]._replace(choices=owners if len(owners) < len(walked) else ())


def _marks(extra: object) -> dict[str, Any]:
    return extra if isinstance(extra, dict) else {}


def with_keys(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a field's JSON schema with the keys that its mark `keys_of` points at, as they are now, as its values."""
    if "keys_of" not in schema:
        return schema
    module, _, name = schema["keys_of"].partition(":")
    plain = {mark: value for mark, value in schema.items() if mark != "keys_of"}
    values = {"type": "string", "enum": list(getattr(importlib.import_module(module), name))}
    return plain | ({"items": values} if schema.get("type") == "array" else values)


def field_names(model: type[BaseModel]) -> list[str]:
    """Return the dotted name of every field of a config class."""
    return [field.name for field in walk(model)]


def text_fields(model: type[BaseModel]) -> set[str]:
    """Return the names of the fields that hold text, where YAML's numbers and words are text too; `name[]` for a field
    that holds a list of texts."""
    return {field.name + kind for field in walk(model) for kind in _text_kinds(field.info.annotation)}


def _text_kinds(annotation: Any, kind: str = "") -> set[str]:
    """Return {""} for `str` or `str | None`, {"[]"} for `tuple[str, ...]`, {} for what may be a number."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if annotation is str or (origin is Literal and all(isinstance(value, str) for value in inner)):
        return {kind}
    if origin is Annotated:
        return _text_kinds(inner[0], kind)
    if origin in (list, tuple):
        return _text_kinds(inner[0], f"{kind}[]")
    if origin in (Union, UnionType):
        kinds = [_text_kinds(part, kind) for part in inner if part is not type(None)]
        return set().union(*kinds) if all(kinds) else set()
    return set()


def marked(model: type[BaseModel], mark: str, *values: object) -> list[str]:
    """Return the names of fields whose mark has one of `values`; a section whose fields all do is `section.`."""
    found = {field.name: field.marks.get(mark) in values for field in walk(model)}
    whole = {name.partition(".")[0] for name in found if "." in name}
    whole -= {name.partition(".")[0] for name, has in found.items() if not has}
    names = [f"{head}." if (head := name.partition(".")[0]) in whole else name for name, has in found.items() if has]
    return list(dict.fromkeys(names))


def matches(name: str, fields: Iterable[str]) -> bool:
    """Return whether a dotted name is one of `fields`, in a section (`section.`) of them, or a key of a dict field."""
    return any(name == field or name.startswith(f"{field.rstrip('.')}.") for field in fields)
