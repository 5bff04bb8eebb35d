"""One HTML page of runs or ablations, which needs no other file: `python tools/report.py RUN... [--out PAGE.html]`.

Shows what is there: curves, samples, measures, sweeps, attention maps, the linear probe, the config; several runs in
the same curves.
"""

import argparse
from pathlib import Path

from command_line import HelpFormatter, run_tool

from data.stores.files import appearing
from trainer.analysis.report import render


def main(arguments: list[str]) -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="RUN", help="run folders, or --out of tools/ablate.py")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page; default: report.html in the first folder")
    args = parser.parse_args(arguments)
    out = args.out or args.folders[0] / "report.html"
    page = render(args.folders)
    with appearing(out) as file:
        file.write(page.encode())
    print(out)


if __name__ == "__main__":
    run_tool(main)
