"""Pixels of an image set in WebDataset shards: `python tools/precompute_pixels.py --images IN --out OUT`.

Keeps the centre crop of each image as uint8, for networks that train on pixels; needs no GPU. Kill it at any time: the
same command resumes, in any number of processes.
"""

import argparse

from command_line import HelpFormatter, add_cluster_options, positive, run_tool
from preprocessing import add_image_options, make_store

from trainer.precompute import precompute_pixels


def main(arguments: list[str]) -> None:
    """Make the shards, or verify them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_image_options(parser, shard_size=512)
    parser.add_argument("--size", type=positive, default=256, metavar="N", help="pixels a side of the centre crop")
    add_cluster_options(parser, gpus=False)
    args = parser.parse_args(arguments)
    make_store(args, precompute_pixels, image_size=args.size)


if __name__ == "__main__":
    run_tool(main)
