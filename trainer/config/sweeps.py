"""The one grammar of sweeps, in all tools: `field=a,b,c`. Commas inside brackets, braces and quotes do not split."""

import itertools

from trainer.errors import RunError

OPENING = {"[": "]", "{": "}"}


def parse_sweep(option: str, sweep: str, example: str = "groups.size=1,2,4") -> tuple[str, list[str]]:
    """Return the field of a sweep and its values, as written. Raise RunError, which names the option, if there are none
    or one is empty."""
    name, _, text = sweep.partition("=")
    values = split_values(text)
    if not name or values is None or not all(value.strip() for value in values):
        raise RunError(f"{option} {sweep}: write field=value,value, as {example}; close brackets and quotes")
    return name, values


def split_values(text: str) -> list[str] | None:
    """Return the parts of `a,[b,c],"d,e"` between its outer commas; None if a bracket or a quote does not close."""
    values, closing, quote = [""], "", ""
    for character in text:
        if character == "," and not closing and not quote:
            values.append("")
            continue
        values[-1] += character
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"" and not values[-1][:-1].strip(" [{,:"):
            quote = character
        elif closing and character == closing[-1]:
            closing = closing[:-1]
        elif character in OPENING:
            closing += OPENING[character]
    return None if closing or quote else values


def combinations(axes: dict[str, list[str]]) -> list[dict[str, str]]:
    """Return every choice of one value for each field, the last field changing fastest."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
