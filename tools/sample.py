"""Samples from a run or one of its checkpoints: `python tools/sample.py RUN [sample.field=value ...]`."""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from trainer.config import parse_config
from trainer.config_file import set_dotted
from trainer.errors import RunError
from trainer.run_folder import read_config
from trainer.samples import make_samples, write_samples
from trainer.weights import find_checkpoint


def main(arguments: list[str]) -> None:
    """Generate and write samples.npz, samples.png and samples.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a run folder (its newest checkpoint) or a checkpoint folder")
    parser.add_argument("overrides", nargs="*", metavar="sample.field=value", help="as sample.guidance=2")
    parser.add_argument("--out", type=Path, help="where to write; default: the run folder")
    parser.add_argument("--raw", action="store_true", help="the weights themselves instead of their EMA")
    parser.add_argument("--weights", type=Path, help="those of this file, as tools/reconstruct_ema.py writes")
    args = parser.parse_intermixed_args(arguments)

    folder = find_checkpoint(args.run)
    tree = read_config(folder).model_dump()
    for override in args.overrides:
        if not override.startswith("sample."):
            raise RunError(f"{override}: only sample.* can be set here; the rest is what the run was trained with")
        set_dotted(tree, override)
    config = parse_config(tree)

    if not args.out and folder.parent.name != "checkpoints":
        raise RunError(f"{folder}: a checkpoint outside a run; say where to write with --out")
    out = args.out or folder.parent.parent
    groups = -(-config.sample.per_class // config.sample.group_size)
    with tqdm(unit="img", desc="sample") as bar:
        pixels, label, record = make_samples(folder, config, args.raw, args.weights, bar.update)
    write_samples(out, pixels, label, record, config.sample.group_size)
    print(f"{out / 'samples.png'} {out / 'samples.npz'}: {label.size} images, {groups} groups a class")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except RunError as error:
        sys.exit(f"error: {error}")
