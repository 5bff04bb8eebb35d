"""VAE latents of an image set in WebDataset shards: `python tools/precompute_latents.py --images IN --out OUT`.

Keeps the posterior moments of each image and of its mirror image. Kill it at any time: the same command goes on, in any
number of processes.
"""

import argparse

from command_line import positive, run_tool
from preprocessing import add_image_options, add_network_options, add_process_options, report, run_in_processes, verify


def main(arguments: list[str]) -> None:
    """Make the shards, or verify them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_image_options(parser)
    add_network_options(parser)
    parser.add_argument("--vae", default="stabilityai/sd-vae-ft-ema", help="an AutoencoderKL: local folder or hub name")
    parser.add_argument("--size", type=positive, default=256, help="pixels a side of the centre crop")
    parser.add_argument("--dtype", choices=["float16", "float32"], default="float16", help="of the stored moments")
    add_process_options(parser)
    args = parser.parse_args(arguments)
    if args.verify:
        verify(args.out, args.images)
    from trainer.precompute import precompute_latents  # slow to import

    run_in_processes(
        args,
        precompute_latents,
        images=args.images.absolute(),
        out=args.out.absolute(),
        vae=args.vae,
        image_size=args.size,
        precision=args.precision,
        dtype=args.dtype,
        part_size=args.shard_size,
        batch=args.batch,
        workers=args.workers,
        max_rejects=args.max_rejects,
    )
    if not args.nodes:
        report(args.out)


if __name__ == "__main__":
    run_tool(main)
