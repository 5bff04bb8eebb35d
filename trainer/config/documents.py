"""configs/README.md and the JSON schemas of editors, from the fields; tools/describe.py writes them."""

import json
import math
from typing import Any

from pydantic import BaseModel

from trainer.config.describe import markdown
from trainer.config.fields import walk, with_keys
from trainer.config.tree import Config

HEAD = """<!-- Made by tools/describe.py, from trainer/config/documents.py and the docstrings of fields. -->
# Configs

A config is one experiment: a YAML file with the fields below, all of which have a default. It makes a run:

    python tools/submit.py configs/digits.yaml                       # the run folder is runs/digits
    python tools/submit.py configs/digits.yaml optim.lr=2e-4 run=runs/other   # with other values
    python tools/submit.py configs/digits.yaml --sweep groups.size=1,2,4 --sweep seed=0,1   # a run for each combination
    python tools/submit.py --fields groups                           # what is written below, in the terminal

- **`base:`** names a YAML file, or several, relative to this one; this file's fields go over those of its bases, later
  bases over earlier ones. `imagenet256/groups/` and the like hold parts for that.
- **Overrides** `field=value` on the command line go over the file. A value is YAML: `groups.window=[null,0]`.
- **Sweeps** are written `field=a,b,c`, in all tools. Commas inside brackets, braces and quotes do not split.
- **YAML** means what it looks like: `010` is 10, `1e-4` is a number, `run: 42` is a folder named 42; `on`, `off`, `yes`
  and `no` are refused, as is a key given twice. `~` and `$VARIABLE` are replaced in paths.
- **Run folders** hold the resolved config. The same command continues a run; only fields that *may change* can have
  another value then.
- **Clusters** have site files of their own, in `cluster/`, for `--site`; `slurm/options.py` has their fields.
- **Editors** with a YAML language server complete and check fields, by `schema.json` in the first line of each file.

**To add a field**, write it into the class of its section, with its type, default and a docstring beneath; the
docstring is what stands here, in `--fields` and in error messages. Marks in `json_schema_extra` say whether it may
change when a run continues, and more (see trainer/config/fields.py). Then run `python tools/describe.py`. A
field that is renamed or dropped gets a line in trainer/config/legacy.py, so that old runs can be read.

Lengths (`train.images`, `optim.warmup`, `optim.decay_images`, `..._every`) are numbers of images, so that they hold for
any batch size.
"""


def readme() -> str:
    """Return configs/README.md."""
    fields = list(walk(Config))
    sections: dict[str, list] = {}
    for field in fields:
        sections.setdefault(field.name.partition(".")[0] if "." in field.name else "", []).append(field)
    parts = [HEAD]
    for name, members in sections.items():
        about = f"{_about(name)}\n\n" if name else ""
        parts.append(f"\n## {name or 'The run'}\n\n{about}{markdown(members)}")
    return "".join(parts)


def _about(section: str) -> str:
    """Return what a section is: its own docstring, or that of its class."""
    info = Config.model_fields[section]
    return " ".join((info.description or type(info.default).__doc__ or "").split())


def schema(model: type[BaseModel], bases: bool = True) -> str:
    """Return the JSON schema of YAML files with fields of a class: any part of them, and `base`."""
    made = _partial(model.model_json_schema())
    if bases:
        base: dict[str, Any] = {"description": "YAML files, relative to this one, whose fields this one's go over."}
        base["anyOf"] = [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]
        made["properties"] = {"base": base, **made["properties"]}
    return json.dumps(made, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _partial(schema: Any) -> Any:
    """Return the schema without required fields, and without what JSON cannot express."""
    if isinstance(schema, list):
        return [_partial(part) for part in schema]
    if isinstance(schema, dict):
        kept = {
            key: value
            for key, value in with_keys(schema).items()
            if key not in ("required", "title") or isinstance(value, dict)
        }
        return {k: _partial(v) for k, v in kept.items() if not (isinstance(v, float) and not math.isfinite(v))}
    return schema
