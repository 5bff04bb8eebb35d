"""Features by which images are compared: `python tools/precompute_features.py --images IN --out OUT --encoder ENC`.

One float16 vector of length 1 per image, in shards like the latents'. Kill it at any time: the same command goes on, in
any number of processes.
"""

import argparse

from command_line import run_tool
from preprocessing import add_image_options, add_network_options, add_process_options, report, run_in_processes, verify


def main(arguments: list[str]) -> None:
    """Make the shards, or verify them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_image_options(parser)
    add_network_options(parser)
    parser.add_argument(
        "--encoder", default="facebook/dinov2-large", help="DINOv2, CLIP, SigLIP, ...: local folder or hub name"
    )
    add_process_options(parser)
    args = parser.parse_args(arguments)
    if args.verify:
        verify(args.out, args.images)
    from trainer.precompute import precompute_features  # slow to import

    run_in_processes(
        args,
        precompute_features,
        images=args.images.absolute(),
        out=args.out.absolute(),
        encoder=args.encoder,
        precision=args.precision,
        part_size=args.shard_size,
        batch=args.batch,
        workers=args.workers,
        max_rejects=args.max_rejects,
    )
    if not args.nodes:
        report(args.out)


if __name__ == "__main__":
    run_tool(main)
