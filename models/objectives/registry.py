"""The loss terms, and their section in a config."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, GetJsonSchemaHandler, SerializeAsAny, create_model
from pydantic.json_schema import JsonSchemaValue

from models.objectives.denoising import Denoising
from models.objectives.term import Term, TermConfig

MAIN = "denoising"  # the term that a run has by default
TERMS: dict[str, type[Term]] = {MAIN: Denoising}


@dataclass(frozen=True)
class Sections:
    """Mark a config field that is a dict of sections: `classes()` returns the class of each possible one, by name."""

    classes: Callable[[], dict[str, type[BaseModel]]]

    def __get_pydantic_json_schema__(self, schema: Any, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        sections = {name: handler(config.__pydantic_core_schema__) for name, config in self.classes().items()}
        return {"type": "object", "properties": sections, "additionalProperties": False}


def _known(value: object) -> object:
    """Check the sections below `loss` against the terms that exist now, and fill in the main one."""
    if not isinstance(value, dict):
        return value
    for name in value:
        if name not in TERMS:
            near = difflib.get_close_matches(str(name), TERMS, n=1, cutoff=0.0)[0]
            raise ValueError(f"{name}: no such loss term; did you mean {near}?")
    value = {MAIN: {}} | value
    fields: dict[str, Any] = {name: (SerializeAsAny[TERMS[name].Config], ...) for name in TERMS if name in value}
    checked = create_model("Losses", __config__=ConfigDict(extra="forbid"), **fields).model_validate(value)
    return {name: getattr(checked, name) for name in fields}  # in the order of TERMS, in which they are summed


Losses = Annotated[
    dict[str, SerializeAsAny[TermConfig]],
    BeforeValidator(_known),
    Field(validate_default=True),
    Sections(lambda: {name: term.Config for name, term in TERMS.items()}),
]
