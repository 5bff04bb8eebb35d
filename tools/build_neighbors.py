"""The neighbour graph of an image set: `python tools/build_neighbors.py --features IN --out OUT --neighbors 64`.

Exact by default. Kill it at any time: the same command resumes, in any number of processes.
"""

import argparse
import json
from pathlib import Path

from command_line import HelpFormatter, add_cluster_options, positive, run_tool
from preprocessing import report, run_in_processes

from data.stores.shards import MANIFEST
from trainer.precompute import build_neighbors


def main(arguments: list[str]) -> None:
    """Build the graph."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "--features", type=Path, required=True, metavar="FOLDER", help="a folder of tools/precompute_features.py"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="where the graph goes; on a shared file system"
    )
    parser.add_argument("--neighbors", type=positive, default=64, metavar="N", help="neighbours of each image")
    parser.add_argument("--method", choices=["exact", "ivf"], default="exact", help="ivf: FAISS, some are missed")
    parser.add_argument("--probes", type=positive, default=32, metavar="N", help="ivf: lists that are looked through")
    parser.add_argument(
        "--precision", choices=["bf16", "fp32"], help="of the first look; default: bf16 on a GPU, else fp32"
    )
    add_cluster_options(parser)
    args = parser.parse_args(arguments)
    run_in_processes(
        args,
        build_neighbors,
        features=args.features.absolute(),
        out=args.out.absolute(),
        neighbors=args.neighbors,
        method=args.method,
        probes=args.probes,
        precision=args.precision,
    )
    if not args.nodes:
        report(args.out)
        if (args.out / MANIFEST).is_file():
            recall = json.loads((args.out / MANIFEST).read_text())["recall"]
            print(f"recall of the {args.neighbors} nearest: {recall:.4f} (of up to 1000 images, against exact search)")


if __name__ == "__main__":
    run_tool(main)
