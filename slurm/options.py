"""What a job asks of its cluster, from a site file and the command line, so that one config runs on many clusters."""

import re
from pathlib import Path
from typing import Any

import pydantic
from pydantic import BaseModel, Field

from slurm.errors import LaunchError

SITES = Path("configs/cluster")


class ClusterOptions(BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True):
    """Fields of a site file, and of `--slurm FIELD=VALUE`. What is left out is sbatch's own default."""

    partition: str | None = None
    """Partition of the cluster, or several separated by commas."""
    account: str | None = None
    """Account that is charged."""
    qos: str | None = None
    """Quality of service."""
    time: int = Field(24 * 60, ge=1)
    """Time limit of a job, in minutes. The job is requeued until the run is finished."""
    signal_delay: int = Field(120, ge=10)
    """Seconds before the time limit when the run saves and stops: at least what a checkpoint takes."""
    gpus_per_node: int | None = Field(None, ge=0)
    """GPUs of a node; left out, one per task."""
    tasks_per_node: int | None = Field(None, ge=1)
    """Processes of a node; left out, one per GPU, or 8."""
    cpus_per_task: int | None = Field(None, ge=1)
    """CPUs of a process."""
    mem: str | None = None
    """Memory of a node, for instance 200GB."""
    constraint: str | None = None
    """Features that a node must have."""
    exclude: str | None = None
    """Hosts to leave out, for instance node[1-2]."""
    reservation: str | None = None
    """Reservation to use."""
    sbatch: list[str] = []
    """Further options of sbatch, for instance --licenses=scratch:1."""
    setup: list[str] = []
    """Shell commands to run before the tasks start, for instance `module load cuda`."""
    retries: int = Field(3, ge=0)
    """How many times in a row the tasks start again after a failure that is not the program's own."""


def site_file(site: str) -> Path:
    """Return the site file of a path, or of a name in configs/cluster/. Raise LaunchError if there is none."""
    path = Path(site) if site.endswith((".yaml", ".yml")) else SITES / f"{site}.yaml"
    if not path.is_file():
        raise LaunchError(f"--site {site}: {path} is no file; sites are files as in {SITES}/")
    return path


def load_options(site: dict[str, Any], settings: list[str]) -> ClusterOptions:
    """Return the options of a site file's fields and, over them, those of settings like `partition=gpu`. Raise
    LaunchError if one of them is wrong."""
    tree = dict(site)
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not (name and equals and value):
            raise LaunchError(f"--slurm {setting}: write FIELD=VALUE, as partition=gpu or time=1440 (minutes)")
        if name in ("sbatch", "setup"):
            before = tree.get(name) or []
            tree[name] = [*before, value] if isinstance(before, list) else before
        else:
            tree[name] = value
    try:
        options = ClusterOptions.model_validate(tree)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        known = f"; known are {', '.join(ClusterOptions.model_fields)}" * (first["type"] == "extra_forbidden")
        raise LaunchError(f"--slurm {name}={tree[name]}: {first['msg']}{known}") from None
    for text in options.sbatch:
        sbatch_option(text)
    if options.signal_delay >= 60 * options.time:
        raise LaunchError(
            f"--slurm signal_delay={options.signal_delay}: seconds, but time={options.time} is minutes; the run would"
            " end as it begins; set less"
        )
    return options


def sbatch_option(text: str) -> tuple[str, str | bool]:
    """Return name and value: '--licenses=scratch:1' -> ("licenses", "scratch:1"), '--exclusive' -> ("exclusive", True).
    Raise LaunchError if `text` is no option."""
    found = re.fullmatch(r"(?:#SBATCH )?--([a-z][\w-]*)(?:=(.+))?", text)
    if not found:
        raise LaunchError(f"--slurm sbatch={text}: write it as --name=value")
    return found[1], found[2] or True
