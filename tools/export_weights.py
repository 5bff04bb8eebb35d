"""Weights as one file: `python tools/export_weights.py RUN_OR_CHECKPOINT OUT.safetensors [--raw]`."""

import argparse
from pathlib import Path

from command_line import HelpFormatter, run_tool

from trainer.checkpoints.weights import export_weights


def main(arguments: list[str]) -> None:
    """Write the file and say of what."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="a run folder (its newest checkpoint) or a checkpoint folder"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="a new .safetensors file")
    parser.add_argument("--raw", action="store_true", help="the weights themselves instead of their EMA")
    args = parser.parse_args(arguments)
    folder = export_weights(args.run, args.out, args.raw)
    print(f"{args.out}: {'raw' if args.raw else 'EMA'} weights of {folder}")


if __name__ == "__main__":
    run_tool(main)
