"""Weights as one file: `python tools/export_weights.py RUN_OR_CHECKPOINT OUT.safetensors [--raw]`."""

import argparse
from pathlib import Path

from command_line import HelpFormatter, run_tool

from trainer.checkpoints.weights import EMA, MODEL, export_weights


def main(arguments: list[str]) -> None:
    """Write the file and say of what."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="a run folder (its newest checkpoint) or a checkpoint folder"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="a new .safetensors file")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--raw", action="store_true", help="the weights themselves instead of their EMA")
    which.add_argument("--weights", default=EMA, metavar="NAME", help="another average, as ema_0.9996")
    args = parser.parse_args(arguments)
    part = MODEL if args.raw else args.weights
    folder = export_weights(args.run, args.out, part)
    print(f"{args.out}: {'raw' if part == MODEL else part.replace(EMA, 'EMA', 1)} weights of {folder}")


if __name__ == "__main__":
    run_tool(main)
