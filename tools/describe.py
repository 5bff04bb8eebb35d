"""What is made from the program: configs/README.md and the schemas of editors from config fields, and the help of tools
in tools/README.md. `python tools/describe.py` writes all of it; a test says when a file is stale."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from slurm.options import ClusterOptions
from trainer.config.documents import readme, schema
from trainer.config.tree import Config

SHOWN = ("submit", "sample", "evaluate", "precompute_pixels")  # the tools whose help is shown
TOOLS_README = Path("tools/README.md")
MARK = "<!-- Below: made by tools/describe.py from what the tools print. -->\n"


def tools_readme() -> str:
    """Return tools/README.md: what is written there by hand, and below the mark the help of some tools."""
    by_hand = TOOLS_README.read_text().partition(MARK)[0]
    helps = (f"\n### {name}.py\n\n```text\n{help_of(name)}```\n" for name in SHOWN)
    return by_hand + MARK + "".join(helps)


def help_of(name: str) -> str:
    """Return what a tool prints for --help in a terminal of 100 columns."""
    command = [sys.executable, f"tools/{name}.py", "--help"]
    env = os.environ | {"COLUMNS": "100"}
    return subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout


DOCUMENTS: dict[Path, Callable[[], str]] = {
    Path("configs/README.md"): readme,
    Path("configs/schema.json"): lambda: schema(Config),
    Path("configs/cluster/schema.json"): lambda: schema(ClusterOptions, bases=False),
    TOOLS_README: tools_readme,
}


if __name__ == "__main__":
    for path, make in DOCUMENTS.items():
        path.write_text(make())
