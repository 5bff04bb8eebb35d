"""Pixels of an image set in WebDataset shards: `python tools/precompute_pixels.py --images IN --out OUT`.

Keeps the centre crop of each image as uint8, for networks that train on pixels; needs no GPU. Kill it at any time: the
same command goes on, in any number of processes.
"""

import argparse

from command_line import positive, run_tool
from preprocessing import add_image_options, add_process_options, report, run_in_processes, verify

from trainer.precompute import precompute_pixels


def main(arguments: list[str]) -> None:
    """Make the shards, or verify them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_image_options(parser, shard_size=512)
    parser.add_argument("--size", type=positive, default=256, help="pixels a side of the centre crop")
    add_process_options(parser, gpus=False)
    args = parser.parse_args(arguments)
    if args.verify:
        verify(args.out, args.images)
    run_in_processes(
        args,
        precompute_pixels,
        images=args.images.absolute(),
        out=args.out.absolute(),
        image_size=args.size,
        part_size=args.shard_size,
        workers=args.workers,
        max_rejects=args.max_rejects,
    )
    if not args.nodes:
        report(args.out)


if __name__ == "__main__":
    run_tool(main)
