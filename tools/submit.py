"""Train: `python tools/submit.py [--nodes N | --cluster local] [CONFIG] [field=value ...]`.

The same command on the same run folder continues the run. `--job sample` submits tools/sample.py instead:
`python tools/submit.py --job sample --nodes 4 RUN --num 50000`. `--status`, `--follow` and `--cancel` take the run
folder, or that of a sweep.
"""

import argparse
import shutil
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path

import submitit
from command_line import HelpFormatter, add_cluster_options, cluster_options, places, positive, run_tool

from data.sets.form import form_of
from slurm.control import cancel, follow, lost_or_ended, runs_in, status
from slurm.errors import LaunchError
from slurm.state import read_state
from slurm.submission import Run, batch_script, submit_runs
from trainer.build import check_start, data_are_here, form_from_config, open_data
from trainer.config.describe import select, table
from trainer.config.parsing import to_yaml
from trainer.config.tree import Config, check_world, load_sweep
from trainer.estimate.hardware import GPUS, Cluster, read_interconnect, read_utilisation
from trainer.estimate.table import estimate_table
from trainer.loop import train
from trainer.run_folder import LOCK, check_folder

DEFAULT_CONFIG = "configs/imagenet256/sit/sit-xl-2-light-4.yaml"

JOB = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
JOB.add_argument("--job", choices=["train", "sample"], default="train", help="sample: what tools/sample.py does")


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, parents=[JOB])
    parser.add_argument(
        "words",
        nargs="*",
        metavar="CONFIG field=value",
        help=f"a config, and other values of its fields; default: {DEFAULT_CONFIG}",
    )
    parser.add_argument(
        "--cluster", choices=["local", "debug", "slurm"], help="where to run; default: slurm with --nodes, else local"
    )
    add_cluster_options(parser)
    parser.add_argument(
        "--sweep", action="append", default=[], metavar="field=a,b,c", help="a run for each value, as groups.size=1,2,4"
    )
    parser.add_argument("--parallel", type=positive, default=256, metavar="N", help="runs of a sweep at once")
    parser.add_argument(
        "--fields", nargs="?", const="", metavar="field", help="show what config fields are: one, a section, or all"
    )
    parser.add_argument("--dry-run", action="store_true", help="print config, script and estimate, and stop")
    parser.add_argument(
        "--classes", type=positive, default=1000, metavar="N", help="for --dry-run where the images are not available"
    )
    parser.add_argument("--gpu", choices=GPUS, default="h100", help="for the estimate")
    parser.add_argument(
        "--interconnect",
        default="400GB/s+50GB/s",
        metavar="RATE+RATE",
        help="what a GPU sends inside a node, and by its share of the network between nodes, for the estimate",
    )
    parser.add_argument(
        "--utilisation",
        default="0.2-0.35",
        metavar="LOW-HIGH",
        help="shares of the peak arithmetic that are reached, for the estimate",
    )
    for action, verb in {"status": "show the state of", "follow": "follow", "cancel": "cancel"}.items():
        parser.add_argument(f"--{action}", type=Path, metavar="RUN", help=f"{verb} a run that was submitted")
    args = parser.parse_intermixed_args(arguments)
    args.overrides = [word for word in args.words if "=" in word and not Path(word).is_file()]
    configs = [word for word in args.words if word not in args.overrides]
    if len(configs) > 1:
        parser.error(f"more than one config: {' '.join(configs)}; overrides are written field=value")
    args.config = configs[0] if configs else DEFAULT_CONFIG
    return args


def main(arguments: list[str]) -> None:
    """Look at runs, or check, submit, and show the progress of local ones until they end."""
    args = parse(arguments)
    if args.fields is not None:
        print(table(select(Config, args.fields), shutil.get_terminal_size().columns))
    elif args.status:
        print(status(args.status))
    elif args.cancel:
        cancel(args.cancel)
    elif args.follow:
        see_ends(runs_in(args.follow), lambda run: follow(run, lost_or_ended(run)))
    else:
        start(args)


def start(args: argparse.Namespace) -> None:
    """Check and submit."""
    cluster = args.cluster or ("slurm" if args.nodes else "local")
    nodes, options = args.nodes or 1, cluster_options(args.site, args.slurm)
    if cluster != "slurm" and nodes > 1:
        raise LaunchError(f"--nodes {nodes}: --cluster {cluster} is this one machine; use --procs for more processes")
    tasks, gpus = places(args.procs, args.cpu, cluster == "slurm", options)
    configs = [check_folder(config) for config in load_sweep(args.config, args.overrides, args.sweep)]
    forms = []
    for config in configs:
        check_world(config, nodes * tasks)
        here = data_are_here(config) or not args.dry_run
        forms.append(form_of(open_data(config)) if here else form_from_config(config, args.classes))
        if here:
            check_start(config, forms[-1])
    root = Path(configs[0].run).parent if args.sweep else Path(configs[0].run)
    if args.dry_run:
        machines = Cluster(nodes, tasks, GPUS[args.gpu], read_interconnect(args.interconnect))
        utilisation = read_utilisation(args.utilisation)
        for config, form in zip(configs, forms, strict=True):
            table = estimate_table(config, form, machines, utilisation)
            if not data_are_here(config):
                shape = "x".join(map(str, form.shape))
                table = f"the images are not here: {shape} as data says, {form.num_classes} classes\n{table}"
            print(to_yaml(config) + textwrap.indent(table, "# "))
        if cluster == "slurm":
            print(batch_script(root, nodes, tasks, gpus, options, len(configs), args.parallel))
    elif cluster == "debug":
        for config in configs:
            print(f"{train(config)}: {config.run}")
    else:
        runs = [Run(Path(config.run), train, (config,), Path(config.run) / LOCK) for config in configs]
        where = (root, cluster, nodes, tasks, gpus, options, args.parallel)
        if cluster == "slurm":
            for run, job in zip(runs, submit_runs(runs, *where), strict=True):
                print(f"job {job.job_id}: run folder {run.folder}, logs in {read_state(run.folder).logs}")
        else:
            of_folder = {run.folder: run for run in runs}
            see_ends(of_folder, lambda folder: follow_here(folder, *submit_runs([of_folder[folder]], *where)), True)


def follow_here(run: Path, job: submitit.Job) -> None:
    """Show the progress of a job of this machine to its end."""
    try:
        follow(run, job.done)
    except KeyboardInterrupt:  # the run has had it too: it saves and ends
        job.wait()


def see_ends(runs: Iterable[Path], wait: Callable[[Path], object], until_stopped: bool = False) -> None:
    """Wait for one after another and print how it ended. LaunchError, when all have ended, about those that failed."""
    failed = []
    for run in runs:
        wait(run)
        try:
            print(report(run))
        except LaunchError as error:
            failed.append(str(error))
        if until_stopped and read_state(run).state == "stopped":
            break
    if failed:
        raise LaunchError("; ".join(failed))


def report(run: Path) -> str:
    """How a run ended. LaunchError if it failed."""
    state = read_state(run)
    if state.state in ("queued", "running"):
        raise LaunchError(f"{run}: its supervisor has ended without a word; see {state.logs}")
    if state.state == "failed":
        raise LaunchError(state.why)
    return f"{state.state}: {run}"


def job(arguments: list[str]) -> None:
    """What --job says: train, or sample."""
    chosen, rest = JOB.parse_known_args(arguments)
    if chosen.job == "sample":
        import sample

        sample.main(rest)
    else:
        main(rest)


if __name__ == "__main__":
    run_tool(job)
