"""Config fields whose values are keys of a dict. The dict is consulted when a config is validated, so a new choice
needs only a line in the dict."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationError
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import InitErrorDetails, PydanticKnownError, core_schema


@dataclass(frozen=True, eq=False)
class NameOf:
    """A field that holds a key of `table`: Annotated[str, NameOf(SAMPLERS)]."""

    table: Mapping[str, Any]

    def check(self, name: object) -> str:
        """Return the name. Raise pydantic's literal error, which lists the names, if it is not in the table."""
        if isinstance(name, str) and name in self.table:
            return name
        *most, last = (repr(known) for known in self.table) if self.table else ("nothing: there is none yet",)
        raise PydanticKnownError("literal_error", {"expected": f"{', '.join(most)} or {last}" if most else last})

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_before_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(self, schema: Any, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"type": "string", "enum": list(self.table)}


@dataclass(frozen=True, eq=False)
class OneOf:
    """A section whose fields depend on what it chooses: Annotated[PathConfig, OneOf(PATHS, "name", "linear")].

    Field `key` of the section names an entry of `table`, a class with a nested pydantic class `Config` that has the
    fields of that choice; without that field the choice is `default`. A name alone stands for a section with only that
    field.
    """

    table: Mapping[str, Any]
    key: str
    default: str

    def configs(self) -> dict[str, type[BaseModel]]:
        """Return the config class of each choice, the default first."""
        names = dict.fromkeys((self.default, *self.table))
        return {name: self.table[name].Config for name in names}

    def read(self, values: Any) -> Any:
        """Return an instance of the chosen config class. Raise pydantic's ValidationError, which names the field, if
        there is no such choice, or if a field is wrong or belongs to another choice."""
        if isinstance(values, BaseModel):
            return values
        values = {self.key: values} if isinstance(values, str) else values
        configs = self.configs()
        if not isinstance(values, Mapping):
            return configs[self.default].model_validate(values)
        name = values.get(self.key, self.default)
        try:
            NameOf(self.table).check(name)
        except PydanticKnownError as error:
            raise _error(error, name, self.key) from None
        for field in values:
            owners = [other for other, config in configs.items() if field in config.model_fields]
            if owners and name not in owners:
                fix = f"is for {self.key}={' or '.join(owners)}; leave it out"
                raise ValueError(f"{field}={values[field]}: {fix}")
        return configs[name].model_validate({**values, self.key: name})

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        read: Callable[[Any], Any] = self.read
        return core_schema.no_info_before_validator_function(read, core_schema.any_schema())

    def __get_pydantic_json_schema__(self, schema: Any, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        sections = [handler(config.__pydantic_core_schema__) for config in self.configs().values()]
        return {"anyOf": [{"type": "string", "enum": list(self.table)}, *sections]}


@dataclass(frozen=True)
class Sections:
    """Mark a config field that is a dict of sections: `classes()` returns the class of each possible one, by name."""

    classes: Callable[[], dict[str, type[BaseModel]]]

    def __get_pydantic_json_schema__(self, schema: Any, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        sections = {name: handler(config.__pydantic_core_schema__) for name, config in self.classes().items()}
        return {"type": "object", "properties": sections, "additionalProperties": False}


def _error(error: PydanticKnownError, value: object, field: str) -> ValidationError:
    """Return the error at a field of the section."""
    details = InitErrorDetails(type=error.type, ctx=error.context or {}, loc=(field,), input=value)
    return ValidationError.from_exception_data("", [details])
