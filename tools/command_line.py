"""How the tools end, and what their command lines have in common."""

import argparse
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import torch

from data.errors import UserError
from slurm.errors import LaunchError
from slurm.options import ClusterOptions, load_options, site_file
from trainer.config.fields import text_fields
from trainer.config.parsing import read_fields
from trainer.errors import RunError


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Help with the default of every option that takes a value and need not be given, in the option's own words if it
    has some; in the description, indented paragraphs keep their lines."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        parts = text.strip().split("\n\n")
        return "\n\n".join(
            part if part.startswith(" ") else textwrap.fill(part, width, break_on_hyphens=False) for part in parts
        )

    def _get_help_string(self, action: argparse.Action) -> str | None:
        free = action.nargs != 0 and not action.required and action.option_strings
        if not free or "default" in (action.help or ""):
            return action.help
        return f"{action.help}; default: {'none' if action.default in (None, []) else '%(default)s'}"


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


def add_cluster_options(parser: argparse.ArgumentParser, gpus: bool = True) -> None:
    """Add the options that say where a tool runs; `gpus`: whether it has a use for them."""
    parser.add_argument("--nodes", type=positive, metavar="N", help="Slurm nodes; default: this machine, without Slurm")
    parser.add_argument(
        "--procs", type=positive, metavar="N", help="processes per node; default: one per GPU, on Slurm 8"
    )
    if gpus:
        parser.add_argument("--cpu", action="store_true", help="ask Slurm for no GPUs")
    else:
        parser.set_defaults(cpu=True)
    parser.add_argument(
        "--site", metavar="FILE", help="options of the cluster, or a name in configs/cluster/; default: sbatch's own"
    )
    parser.add_argument(
        "--slurm", action="append", default=[], metavar="field=value", help="option of the cluster, as partition=gpu"
    )


def add_weights_options(parser: argparse.ArgumentParser, also: str = "") -> None:
    """Add the run and the options that say which of its weights are meant; `also`: what else RUN may be."""
    about = f"a run folder (its newest checkpoint) or a checkpoint folder{also}"
    parser.add_argument("run", type=Path, metavar="RUN", help=about)
    parser.add_argument("--raw", action="store_true", help="the weights themselves instead of their EMA")
    parser.add_argument(
        "--weights",
        metavar="NAME",
        help="another average, as ema_0.9996, or a file of reconstruct_ema.py or convert_weights.py; default: ema",
    )


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
