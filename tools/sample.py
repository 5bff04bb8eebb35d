"""Samples from a run, a checkpoint or a file of weights: `python tools/sample.py RUN [sample.field=value ...]`.

Without --num: sample.per_class images of every class as a picture and an .npz, in this process. With --num N: N images
for metrics, by any number of processes; kill it at any time, the same command resumes.
"""

import argparse
from pathlib import Path

from command_line import HelpFormatter, add_cluster_options, add_weights_options, positive, run_tool
from preprocessing import run_in_processes
from tqdm import tqdm

from trainer.checkpoints.weights import WeightSource, find_checkpoint, find_source, place_in_run
from trainer.config.fields import marked, matches
from trainer.config.tree import Config, change_config, load_config
from trainer.errors import RunError
from trainer.run_folder import read_config
from trainer.sampling.many import RECORD, sample_many
from trainer.sampling.networks import fixed
from trainer.sampling.samples import make_samples, write_samples


def main(arguments: list[str]) -> None:
    """Generate and write samples.npz (or image files), samples.json and, without --num, samples.png."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_weights_options(parser, "; with --weights also a config")
    parser.add_argument("overrides", nargs="*", metavar="field=value", help="as sample.guidance=2")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="where to write; default: the run folder, or samples-N in it"
    )
    parser.add_argument(
        "--num", type=positive, metavar="N", help="so many samples for metrics, with classes as sample.labels"
    )
    parser.add_argument("--format", choices=["npz", "png"], help="with --num: one file, or one for each; default: npz")
    add_cluster_options(parser)
    args = parser.parse_intermixed_args(arguments)

    source, config = find(args)
    args.out = args.out or place_in_run(source.checkpoint, f"samples-{args.num}" if args.num else "")
    if args.num:
        about = {"number": args.num, "out": args.out.absolute(), "form": args.format or "npz"}
        run_in_processes(args, sample_many, source=source, config=config, **about)
        if not args.nodes:
            complete = (args.out / RECORD).exists()
            print(f"{args.out}: {f'{args.num} images' if complete else 'not complete; the same command resumes'}")
        return
    for option, given in {"--nodes": args.nodes, "--procs": args.procs, "--format": args.format}.items():
        if given:
            raise RunError(f"{option} {given}: is for --num; without it, this process makes a picture and an .npz")
    with tqdm(unit="img", desc="sample") as bar:
        pixels, label, record = make_samples(source, config, bar.update)
    write_samples(args.out, pixels, label, record, config.sample.group_size)
    each = f"{record['evaluations']} evaluations each"
    print(f"{args.out / 'samples.png'} {args.out / 'samples.npz'}: {label.size} images, {each}")


def find(args: argparse.Namespace) -> tuple[WeightSource, Config]:
    """Return where the weights come from, and the config, changed as the command line says."""
    free = marked(Config, "sampling", "only", "also")
    for override in args.overrides:
        if not matches(override.partition("=")[0], free):
            known = ", ".join(f"{name}*" if name.endswith(".") else name for name in free)
            raise RunError(f"{override}: only {known} can be set here; the rest is what it was trained with")
    if args.run.suffix == ".yaml":
        if not args.weights:
            raise RunError(f"{args.run}: a config has no weights; give a file with --weights, or a run folder")
        return find_source(None, args.weights, args.raw), fixed(load_config(args.run, args.overrides))
    folder = find_checkpoint(args.run.absolute())
    return find_source(folder, args.weights, args.raw), fixed(change_config(read_config(folder), args.overrides))


if __name__ == "__main__":
    run_tool(main)
