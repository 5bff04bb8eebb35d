"""VAE latents of an image set in WebDataset shards: `python tools/precompute_latents.py --images IN --out OUT`.

Keeps the posterior moments of each image and of its mirror image. Kill it at any time: the same command resumes, in any
number of processes.
"""

import argparse

from command_line import HelpFormatter, add_cluster_options, positive, run_tool
from preprocessing import add_image_options, add_network_options, make_store

from trainer.precompute import precompute_latents


def main(arguments: list[str]) -> None:
    """Make the shards, or verify them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_image_options(parser)
    add_network_options(parser)
    parser.add_argument(
        "--vae", default="stabilityai/sd-vae-ft-ema", metavar="FOLDER", help="an AutoencoderKL, or its hub name"
    )
    parser.add_argument("--size", type=positive, default=256, metavar="N", help="pixels a side of the centre crop")
    parser.add_argument("--dtype", choices=["float16", "float32"], default="float16", help="of the stored moments")
    add_cluster_options(parser)
    args = parser.parse_args(arguments)
    make_store(
        args,
        precompute_latents,
        vae=args.vae,
        image_size=args.size,
        precision=args.precision,
        dtype=args.dtype,
        batch=args.batch,
    )


if __name__ == "__main__":
    run_tool(main)
