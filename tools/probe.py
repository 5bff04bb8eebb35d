"""How much of the class a linear classifier reads from inside of the network: `python tools/probe.py RUN`.

Logistic regression on the features of every layer at some noise levels, each image alone and without its class. Writes
RUN/probe/probe.json and .png.
"""

import argparse
import json
from pathlib import Path

from command_line import HelpFormatter, add_weights_options, numbers, positive, run_tool
from tqdm import tqdm

from trainer.analysis.attention_plots import save
from trainer.analysis.probe import linear_probe, probe_map
from trainer.checkpoints.weights import find_checkpoint, find_source, place_in_run
from trainer.run_folder import read_config


def main(arguments: list[str]) -> None:
    """Probe a checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_weights_options(parser)
    parser.add_argument("--log-snr", type=numbers, default="-4,-2,0,2,4", metavar="N,N", help="noise levels")
    parser.add_argument("--images", type=positive, default=10_000, metavar="N", help="at most so many")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to write; default: RUN/probe")
    args = parser.parse_args(arguments)
    folder, levels = find_checkpoint(args.run), list(args.log_snr)
    out, source = args.out or place_in_run(folder, "probe"), find_source(folder, args.weights, args.raw)
    with tqdm(unit="img", desc="features") as bar:
        probe = linear_probe(source, read_config(folder), levels, args.images, bar.update)
    out.mkdir(parents=True, exist_ok=True)
    record = {
        "checkpoint": str(folder),
        "position": source.position,
        "weights": source.weights,
        "train_images": probe.train_images,
        "test_images": probe.test_images,
        "log_snr": probe.levels.tolist(),
        "accuracy_by_layer_and_level": probe.accuracy.tolist(),
    }
    (out / "probe.json").write_text(json.dumps(record, indent=1) + "\n")
    save(probe_map(probe), out / "probe.png")
    layer, level = divmod(int(probe.accuracy.argmax()), len(levels))
    best = probe.accuracy[layer, level]
    print(f"best: {best:.1%} after layer {layer} at log-SNR {probe.levels[level]:.1f}; {out / 'probe.png'}")


if __name__ == "__main__":
    run_tool(main)
