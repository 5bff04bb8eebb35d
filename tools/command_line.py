"""How the tools end, and what their command lines have in common."""

import argparse
import sys
from collections.abc import Callable

import torch

from data.errors import UserError
from slurm.errors import LaunchError
from slurm.options import ClusterOptions, load_options, site_file
from trainer.config.fields import text_fields
from trainer.config.parsing import read_fields
from trainer.errors import RunError


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Help with the default of every option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        said = default in (None, False, argparse.SUPPRESS) or default == [] or "default" in (action.help or "")
        return action.help if said else f"{action.help}; default: %(default)s"


def positive(text: str) -> int:
    """A whole number from 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be 1 or more")
    return value


def not_negative(text: str) -> int:
    """A whole number from 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text}: must be 0 or more")
    return value


def numbers(text: str) -> tuple[float, ...]:
    """As 1,1.5,2; what is no number, argparse refuses."""
    return tuple(float(number) for number in text.split(","))


def cluster_options(site: str | None, settings: list[str]) -> ClusterOptions:
    """Return the options of a site file (a path, or the name of one in configs/cluster/) and, over them, those of
    settings like `partition=gpu`. Raise LaunchError if one of them is wrong."""
    if not site:
        return load_options({}, settings)
    try:
        fields = read_fields(site_file(site), text_fields(ClusterOptions), "partition: gpu")
    except RunError as error:
        raise LaunchError(f"--site {error}") from None
    return load_options(fields, settings)


def places(procs: int | None, cpu: bool, on_slurm: bool, options: ClusterOptions) -> tuple[int, int]:
    """(processes, GPUs) of a node; `procs` and `cpu` as the user asked."""
    here = torch.cuda.device_count()
    if not on_slurm:
        tasks = procs or max(here, 1)
        return tasks, min(here, tasks)
    tasks = procs or options.tasks_per_node or options.gpus_per_node or 8
    gpus = tasks if options.gpus_per_node is None else options.gpus_per_node
    return tasks, 0 if cpu else gpus


def run_tool(main: Callable[[list[str]], object]) -> None:
    """Call `main` with the command line; errors that the user can fix are one line, and the exit code is 1."""
    try:
        main(sys.argv[1:])
    except (UserError, LaunchError) as error:
        sys.exit(f"error: {error}")
