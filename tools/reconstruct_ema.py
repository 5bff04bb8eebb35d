"""Average weights of any length, after training: `python tools/reconstruct_ema.py runs/x OUT.safetensors --std 0.10`.

The run must have been trained with optim.power_ema=[0.05,0.1] and checkpoint.snapshot_every=IMAGES.
"""

import argparse
from pathlib import Path

from command_line import HelpFormatter, run_tool

from trainer.sampling.reconstruct import reconstruct


def main(arguments: list[str]) -> None:
    """Reconstruct, and say of what."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("out", type=Path, metavar="OUT", help="a new .safetensors file")
    parser.add_argument(
        "--std", type=float, required=True, metavar="N", help="width of the average, relative to the run's length"
    )
    parser.add_argument("--position", type=int, metavar="N", help="images seen; default: those of the last snapshot")
    args = parser.parse_args(arguments)
    number = reconstruct(args.run, args.std, args.out, args.position)
    print(f"{args.out}: from {number} snapshots")


if __name__ == "__main__":
    run_tool(main)
