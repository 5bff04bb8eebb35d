"""Train: `python tools/submit.py [--nodes N | --cluster local] CONFIG [field=value ...]`.

The same command on the same run folder continues the run.
"""

import argparse
import sys
from datetime import datetime
from pathlib import Path

import torch

from slurm.launch import LaunchError, follow, make_executor, parse_option, submit
from trainer.build import open_data
from trainer.config import check_world, load_config
from trainer.config_file import to_yaml
from trainer.errors import RunError
from trainer.loop import train
from trainer.run_folder import check_folder


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a YAML file, as configs/digits.yaml")
    parser.add_argument("overrides", nargs="*", metavar="field=value", help="as optim.lr=2e-4 groups.size=8")
    parser.add_argument("--cluster", choices=["local", "slurm"], help="default: slurm with --nodes, else local")
    parser.add_argument("--nodes", type=int, help="Slurm nodes")
    parser.add_argument("--procs", type=int, help="processes per node; default: one per GPU (on Slurm: 8)")
    parser.add_argument("--cpu", action="store_true", help="ask Slurm for no GPUs")
    parser.add_argument("--slurm", action="append", default=[], metavar="KEY=VALUE", help="as --slurm partition=gpu")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config and stop")
    return parser.parse_intermixed_args(arguments)


def main(arguments: list[str]) -> None:
    """Check, submit, and for a local run show its progress until it ends."""
    args = parse(arguments)
    cluster = args.cluster or ("slurm" if args.nodes else "local")
    here = torch.cuda.device_count()
    procs = args.procs or (8 if cluster == "slurm" else max(here, 1))
    gpus = (0 if args.cpu else procs) if cluster == "slurm" else min(here, procs)
    options = dict(parse_option(option) for option in args.slurm)

    config = load_config(args.config, args.overrides)
    check_world(config, (args.nodes or 1) * procs)
    open_data(config)
    check_folder(config)
    if args.dry_run:
        print(to_yaml(config), end="")
        return

    run = Path(config.run).absolute()
    logs = run / "logs" / datetime.now().strftime("%Y%m%d-%H%M%S-%f")
    executor = make_executor(cluster, logs, run.name, args.nodes or 1, procs, gpus, options)
    job = submit(executor, train, config.model_copy(update={"run": str(run)}))
    if cluster == "slurm":
        print(f"job {job.job_id}: run folder {run}, logs in {logs}")
        return
    outcome = follow(job)
    print(f"{outcome}: {run}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (RunError, LaunchError) as error:
        sys.exit(f"error: {str(error).removeprefix('trainer.errors.RunError: ')}")
