"""How good samples are: metrics of a run, of any images, or of a sweep.

    evaluate.py RUN                                            by a small classifier of real images
    evaluate.py RUN --detector FILE --reference FILE           FID and its kin, by a network
    evaluate.py --images FILE --detector FILE --reference FILE the same, of any images
    evaluate.py RUN --sweep sample.guidance=1,1.5,2 ...        every combination, and a plot

Run tools/sample.py first, but for --sweep. With a detector, `torchrun --nproc_per_node=N tools/evaluate.py ...` shares
the work.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from command_line import HelpFormatter, run_tool
from tqdm import tqdm

from data.errors import UserError
from data.sets.registry import open_halves
from trainer.checkpoints.weights import find_checkpoint
from trainer.errors import RunError
from trainer.evaluation.by_detector import evaluate_images, open_detector
from trainer.evaluation.classifier import make_evaluator
from trainer.evaluation.groups import group_size, record_of
from trainer.evaluation.image_sets import open_npz
from trainer.ranks import Ranks, process_group
from trainer.run_folder import read_config


def main(arguments: list[str]) -> None:
    """Print the report; write RUN/report.json, or with a detector a line of RUN/evaluations.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", metavar="RUN", help="a run folder with samples.npz")
    parser.add_argument("overrides", nargs="*", metavar="field=value", help="for --sweep: of all its samples")
    parser.add_argument(
        "--detector",
        metavar="FILE",
        help="TorchScript, as inception-2015-12-05.pt, or DINOv2 by folder or name; default: a small classifier",
    )
    parser.add_argument(
        "--reference", type=Path, metavar="FILE", help="ADM's .npz, or real images: .npz with arr_0, folder, tar shards"
    )
    parser.add_argument(
        "--metrics",
        metavar="NAME,NAME",
        help="as fid,is,kid; default: all that detector and reference allow",
    )
    parser.add_argument(
        "--images", type=Path, metavar="FILE", help=".npz or folder to measure; default: the run's samples.npz"
    )
    parser.add_argument(
        "--cache", type=Path, metavar="FOLDER", help="for statistics of references; default: a folder beside each"
    )
    parser.add_argument(
        "--sweep", action="append", metavar="field=a,b,c", help="sample.field=..., or weights=ema,ema_0.9996,raw,FILE"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where a sweep is written; default: RUN/sweep")
    args = parser.parse_intermixed_args(arguments)
    _check(args)
    with process_group() as ranks:
        if args.sweep:
            _sweep(args, ranks)
            return
        if args.detector:
            report = _by_detector(args, ranks, args.images, args.run)
        else:
            report = _by_classifier(_evaluator(args.run), args.run)
    if ranks.rank == 0:
        if args.run and args.detector:
            with (args.run / "evaluations.jsonl").open("a") as file:
                file.write(json.dumps(report) + "\n")
        elif args.run:
            (args.run / "report.json").write_text(json.dumps(report, indent=1) + "\n")
        print(json.dumps(report, indent=1))


def _check(args: argparse.Namespace) -> None:
    if not args.run and not args.images:
        raise RunError("RUN: give a run folder, or --images with a file or folder of images")
    if args.images and not args.detector:
        raise RunError(f"--images {args.images}: needs --detector and --reference")
    if bool(args.detector) != bool(args.reference):
        raise RunError("--detector, --reference: give both, or none of them")
    for option, given in {"--metrics": args.metrics, "--cache": args.cache}.items():
        if given and not args.detector:
            raise RunError(f"{option} {given}: needs --detector and --reference")
    if args.overrides and not args.sweep:
        raise RunError(f"{args.overrides[0]}: is for --sweep; otherwise give it to tools/sample.py")


def _evaluator(run: Path) -> Callable[..., dict]:
    """By the images that the run was trained on."""
    config = read_config(run)
    try:
        return make_evaluator(*open_halves(config.data))
    except UserError as error:
        raise RunError(f"{error}; give --detector and --reference") from None


def _by_classifier(evaluate: Callable[..., dict], folder: Path) -> dict:
    """Of samples.npz in a folder."""
    samples, record = _samples(folder)
    with open_npz(samples) as arrays:
        return evaluate(arrays["arr_0"], arrays["arr_1"], group_size(record)) | {"samples": record}


def _by_detector(args: argparse.Namespace, ranks: Ranks, images: Path | None, folder: Path | None) -> dict | None:
    """Of `images`, or of samples.npz in a folder."""
    record = None
    if images is None:
        assert folder  # `_check` asks for one of them
        images, record = _samples(folder)
    elif beside := record_of(images):
        record = json.loads(beside.read_text())
    detector = open_detector(args.detector, ranks)
    metrics = args.metrics.split(",") if args.metrics else None
    with tqdm(unit="img", desc="evaluate", disable=ranks.rank > 0) as bar:
        report = evaluate_images(detector, images, args.reference, metrics, ranks, args.cache, bar.update)
    return report and report | {"samples": record}


def _sweep(args: argparse.Namespace, ranks: Ranks) -> None:
    from trainer.sampling.sweep import parse_axes, run_sweep
    from trainer.sampling.sweep_plot import plot_sweep  # matplotlib is slow to import

    if not args.run or args.images or ranks.world_size > 1:
        raise RunError("--sweep: give a run folder, without --images, to one process")
    checkpoint = find_checkpoint(args.run)
    out, axes = args.out or args.run / "sweep", parse_axes(args.sweep)
    evaluate = None if args.detector else _evaluator(args.run)

    def measure(folder: Path) -> dict:
        report = _by_classifier(evaluate, folder) if evaluate else _by_detector(args, ranks, None, folder)
        assert report is not None  # this is the only rank
        return report

    with tqdm(unit="img", desc="sample") as bar:
        rows = run_sweep(checkpoint, axes, args.overrides, out, measure, bar.update)
    plot_sweep(rows, out / "sweep.png")
    for row in rows:
        print(*(f"{name}={value}" for name, value in row["axes"].items()), end="  ")
        print(*(f"{name} {value:.4g}" for name, value in row.items() if isinstance(value, float)))
    print(f"{out / 'sweep.jsonl'} {out / 'sweep.png'}")


def _samples(folder: Path) -> tuple[Path, dict]:
    samples, record = folder / "samples.npz", folder / "samples.json"
    for file in (samples, record):
        if not file.is_file():
            raise RunError(f"{file}: not there; make it with: python tools/sample.py {folder}")
    return samples, json.loads(record.read_text())


if __name__ == "__main__":
    run_tool(main)
