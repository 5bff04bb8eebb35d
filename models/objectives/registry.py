"""The loss terms, and their section in a config."""

import difflib
from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field, SerializeAsAny, create_model

from models.choice import Sections
from models.objectives.denoising import Denoising
from models.objectives.term import Term, TermConfig

MAIN = "denoising"  # the term that a run has by default
TERMS: dict[str, type[Term]] = {MAIN: Denoising}


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
