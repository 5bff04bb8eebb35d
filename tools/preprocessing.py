"""What the preprocessing tools have in common: their options, and their processes, here or on nodes."""

import argparse
import json
import sys
from collections.abc import Callable
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from command_line import cluster_options, not_negative, places, positive

from data.extraction.sources import Parts, list_source
from data.extraction.verify import verify_store
from data.stores.shards import MANIFEST
from slurm.launch import call_share, follow, submit_array, submit_here


def add_image_options(parser: argparse.ArgumentParser, shard_size: int = 2048) -> None:
    """Which images become which shards."""
    parser.add_argument(
        "--images",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="a tree of class folders, or a folder of tar shards",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="where the shards go; on a shared file system"
    )
    parser.add_argument(
        "--workers", type=not_negative, default=4, metavar="N", help="processes that decode images, for each GPU"
    )
    parser.add_argument(
        "--shard-size",
        type=positive,
        default=shard_size,
        metavar="N",
        help="images of a shard, if IN has class folders",
    )
    parser.add_argument(
        "--max-rejects",
        type=not_negative,
        default=0,
        metavar="N",
        help="damaged images allowed; rejected.jsonl lists them",
    )
    parser.add_argument("--verify", action="store_true", help="only prove that all is there, once and unharmed")


def add_network_options(parser: argparse.ArgumentParser) -> None:
    """How the network that encodes the images computes."""
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16", help="of the network's arithmetic")
    parser.add_argument("--batch", type=positive, default=32, metavar="N", help="images the network takes at once")


def run_in_processes(args: argparse.Namespace, function: Callable[..., Any], **arguments: Any) -> None:
    """Call `function(**arguments, process=..., processes=...)` in every process asked for, and wait for them; jobs of
    Slurm are only submitted."""
    options = cluster_options(args.site, args.slurm)
    if options.cpus_per_task is None:
        options = options.model_copy(update={"cpus_per_task": 1 + arguments.get("workers", 0)})
    nodes, (procs, gpus) = args.nodes or 1, places(args.procs, args.cpu, bool(args.nodes), options)
    if not args.nodes and procs == 1:
        function(**arguments)
        return
    logs = args.out.absolute() / "logs" / datetime.now().strftime("%Y%m%d-%H%M%S-%f")
    shares = [partial(call_share, function, arguments, node * procs, nodes * procs) for node in range(nodes)]
    if args.nodes:
        jobs = submit_array(logs, args.out.name, procs, gpus, options, shares)
        print(f"jobs {' '.join(job.job_id for job in jobs)}: logs in {logs}")
    else:
        follow(submit_here(logs, procs, gpus, shares[0]))


def make_store(args: argparse.Namespace, function: Callable[..., Any], **arguments: Any) -> None:
    """Make the store of images that the options of `add_image_options` ask for, or verify it."""
    if args.verify:
        verify_against(args.out, list_source(args.images, part_size=2048))
    run_in_processes(
        args,
        function,
        images=args.images.absolute(),
        out=args.out.absolute(),
        part_size=args.shard_size,
        workers=args.workers,
        max_rejects=args.max_rejects,
        **arguments,
    )
    if not args.nodes:
        report(args.out)


def report(folder: Path) -> None:
    """Whether the work in a folder is complete."""
    path = folder / MANIFEST
    if not path.is_file():
        print(f"{folder}: not complete yet; the same command resumes")
        return
    manifest = json.loads(path.read_text())
    print(f"{folder}: complete, {manifest['images']} images, {manifest.get('rejected', 0)} rejected")


def verify_against(folder: Path, source: Parts) -> None:
    """Print what is wrong with a store, and exit: with code 1 if anything is."""
    problems = list(verify_store(folder, source))
    print("\n".join(problems) or f"{folder}: verified: every image once, every byte as written")
    sys.exit(1 if problems else 0)
