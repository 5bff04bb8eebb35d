"""What runs is what was submitted: a copy of the code, taken at submission and used by every start of the job."""

import os
import shutil
from pathlib import Path

from slurm.files import replacing

PACKAGES = ("data", "models", "slurm", "trainer")
ROOT = Path(__file__).parents[1]


def take_snapshot(folder: Path) -> Path:
    """Copy the packages to `folder`, which appears whole, and return it."""
    with replacing(folder) as partial:
        for package in PACKAGES:
            shutil.copytree(ROOT / package, partial / package, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    return folder


def python_path(snapshot: Path) -> str:
    """Return a PYTHONPATH in which the snapshot precedes the code that it was copied from."""
    others = os.environ.get("PYTHONPATH", "")
    return f"{snapshot}:{others}" if others else str(snapshot)
