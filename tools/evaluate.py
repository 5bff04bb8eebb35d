"""How good the samples of a run are: `python tools/evaluate.py RUN` writes report.json (run tools/sample.py first)."""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from trainer.build import open_data
from trainer.errors import RunError
from trainer.evaluate import evaluate
from trainer.run_folder import read_config


def main(arguments: list[str]) -> None:
    """Evaluate the samples.npz of a run folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a run folder with samples.npz")
    args = parser.parse_intermixed_args(arguments)

    config = read_config(args.run)
    if config.data.name != "digits":
        raise RunError(f"data.name={config.data.name}: only samples of digits can be evaluated as yet")
    samples, record = args.run / "samples.npz", args.run / "samples.json"
    for file in (samples, record):
        if not file.is_file():
            raise RunError(f"{file}: not there; make it with: python tools/sample.py {args.run}")
    arrays = np.load(samples)
    images = (open_data(config, split) for split in ("train", "heldout"))
    report = evaluate(arrays["arr_0"], arrays["arr_1"], *images)
    report["samples"] = json.loads(record.read_text())
    (args.run / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except RunError as error:
        sys.exit(f"error: {error}")
