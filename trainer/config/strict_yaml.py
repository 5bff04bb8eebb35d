"""YAML that means what it looks like: the scalars of YAML 1.2, without the surprises of older versions.

Numbers are decimal (`010` is 10, `1e-4` is a number, `1:30` is text), booleans are `true` and `false`; `on`, `off`,
`yes` and `no` are refused, and so is a key given twice. The value of a text field stays as it is written.
"""

import re
from collections.abc import Container
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

TAG = "tag:yaml.org,2002:"
UNCLEAR = "!unclear"  # a word that is a boolean in older versions of YAML
SCALARS = {  # what a plain scalar is, by its first characters and its whole text
    f"{TAG}null": ("~nN", r"~|null|Null|NULL|"),
    f"{TAG}bool": ("tTfF", r"true|True|TRUE|false|False|FALSE"),
    f"{TAG}int": ("-+0123456789", r"[-+]?[0-9][0-9_]*"),
    f"{TAG}float": (
        "-+.0123456789",
        r"[-+]?(?:(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)",
    ),
    f"{TAG}merge": ("<", "<<"),
    UNCLEAR: ("oOyYnN", r"on|On|ON|off|Off|OFF|yes|Yes|YES|no|No|NO"),
}


class YamlError(ValueError):
    """Text that is not YAML, or that may be misread. The one-line message gives the number of the line at fault."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list] = {}


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict[str, list] = {}


for _tag, (_first, _pattern) in SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, re.compile(f"(?:{_pattern})$"), [*_first, *([""] * _tag.endswith("null"))])


def _integer(loader: yaml.SafeLoader, node: ScalarNode) -> int:
    return int(loader.construct_scalar(node).replace("_", ""))


_Loader.add_constructor(f"{TAG}int", _integer)


def parse(text: str, texts: Container[str] = (), name: str = "") -> Any:
    """Return the plain values of a YAML text. `name` is the field whose value is the whole text; `texts` are the dotted
    names of fields that hold text, followed by `[]` if they hold a list of texts. Raise YamlError unless the text can
    be read in exactly one way."""
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check(node, texts, name)
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = str(error.problem or error.context)
        if "\\t" in problem:
            problem = "a tab; indent with spaces"
        raise YamlError(f"not YAML: line {mark.line + 1 if mark else '?'}: {problem}") from None
    except yaml.YAMLError as error:  # a character that YAML does not allow
        raise YamlError(f"not YAML: {' '.join(str(error).split())}") from None
    finally:
        if loader:
            loader.dispose()


def dump(values: Any) -> str:
    """Return the values as a YAML text that `parse` reads back."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)


def _check(node: Node, texts: Container[str], name: str) -> None:
    """Refuse what is unclear, and mark the values of text fields as text."""
    if isinstance(node, MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            if not isinstance(key, ScalarNode):
                raise YamlError(f"not YAML: line {_line(key)}: a key must be a word")
            if key.tag == f"{TAG}merge":
                _check(value, texts, name)
                continue
            key.tag = f"{TAG}str"
            place = f"{name}.{key.value}" if name else key.value
            if key.value in lines:
                raise YamlError(f"{place}: given twice, in lines {lines[key.value]} and {_line(key)}; keep one")
            lines[key.value] = _line(key)
            _check(value, texts, place)
    elif isinstance(node, SequenceNode):
        for value in node.value:
            _check(value, texts, f"{name}[]")
    elif name in texts and node.tag != f"{TAG}null":
        node.tag = f"{TAG}str"
    elif node.tag == UNCLEAR:
        meant = str(node.value.lower() in ("on", "yes")).lower()
        field = name.replace("[]", "")
        raise YamlError(f"{field}={node.value}: line {_line(node)} may be misread; write {meant}, or '{node.value}'")


def _line(node: Node) -> int:
    return node.start_mark.line + 1
