"""Features by which images are compared: `python tools/precompute_features.py --images IN --out OUT --encoder ENC`.

One float16 vector of length 1 per image, in shards like the latents'. Kill it at any time: the same command resumes, in
any number of processes.
"""

import argparse

from command_line import HelpFormatter, add_cluster_options, run_tool
from preprocessing import add_image_options, add_network_options, make_store

from trainer.precompute import precompute_features


def main(arguments: list[str]) -> None:
    """Make the shards, or verify them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_image_options(parser)
    add_network_options(parser)
    parser.add_argument(
        "--encoder",
        default="facebook/dinov2-large",
        metavar="FOLDER",
        help="DINOv2, CLIP, SigLIP, ..., or its hub name",
    )
    add_cluster_options(parser)
    args = parser.parse_args(arguments)
    make_store(args, precompute_features, encoder=args.encoder, precision=args.precision, batch=args.batch)


if __name__ == "__main__":
    run_tool(main)
