"""Shards for streaming: `python tools/cluster_latents.py --latents IN --features IN --out OUT`.

Writes latents and features of the same images as one store, similar images in one shard. Kill it at any time: the same
command resumes, in any number of processes.
"""

import argparse
from pathlib import Path

from command_line import HelpFormatter, add_cluster_options, positive, run_tool
from preprocessing import report, run_in_processes, verify_against

from data.neighbors.clusters import StoredKeys, cluster_latents
from data.stores.store import Store, read_manifest


def main(arguments: list[str]) -> None:
    """Make the shards, or verify them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "--latents", type=Path, required=True, metavar="FOLDER", help="a folder of tools/precompute_latents.py"
    )
    parser.add_argument(
        "--features", type=Path, required=True, metavar="FOLDER", help="a folder of tools/precompute_features.py"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="where the shards go; on a shared file system"
    )
    parser.add_argument("--shard-size", type=positive, default=1024, metavar="N", help="images of a shard, about")
    parser.add_argument("--verify", action="store_true", help="only prove that all is there, once and unharmed")
    add_cluster_options(parser)
    args = parser.parse_args(arguments)
    latents = args.latents.absolute()
    if args.verify:
        verify_against(args.out, StoredKeys(Store(latents, read_manifest(latents, "latents", "precompute_latents.py"))))
    run_in_processes(
        args,
        cluster_latents,
        latents=latents,
        features=args.features.absolute(),
        out=args.out.absolute(),
        shard_size=args.shard_size,
    )
    if not args.nodes:
        report(args.out)


if __name__ == "__main__":
    run_tool(main)
