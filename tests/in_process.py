"""Tools called in this process, which has imported everything already: for calls that are quick."""

import runpy
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from typing import NamedTuple

import pytest


class Said(NamedTuple):
    """What a tool printed."""

    out: str
    err: str


def call(name, *arguments, code=0):
    """tools/`name`.py with these arguments; its exit code must be `code`."""
    out, err, ended = StringIO(), StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.syspath_prepend("tools")
        patch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        try:
            runpy.run_path(f"tools/{name}.py", run_name="__main__")
        except SystemExit as end:
            ended = end.code
    if isinstance(ended, str):  # a message, which the interpreter would print
        err.write(f"{ended}\n")
        ended = 1
    assert ended == code, out.getvalue() + err.getvalue()
    return Said(out.getvalue(), err.getvalue())
