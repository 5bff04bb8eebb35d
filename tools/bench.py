"""Measure: `python tools/bench.py NAME [--json]`. Targets are shown beside their figures; exit code 1 if one is missed.

The last line is one JSON object {"name", "figures", "targets", "ok"}; `targets` gives the bound of a figure.
"""

import argparse
import importlib
import json
import operator
import sys
from pathlib import Path

from command_line import HelpFormatter

SHARED = {"network", "pictures"}  # what benchmarks need
BENCHMARKS = sorted({file.stem for file in Path(__file__).with_name("benchmarks").glob("[a-z]*.py")} - SHARED)
COMPARE = {">=": operator.ge, "<=": operator.le, "<": operator.lt, "==": operator.eq}


def main(arguments: list[str]) -> int:
    """Run one benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("name", choices=BENCHMARKS, type=lambda name: name.replace("-", "_"))
    parser.add_argument("--json", action="store_true", help="the JSON line alone")
    args = parser.parse_args(arguments)
    figures, targets = importlib.import_module(f"benchmarks.{args.name}").measure()
    met = {name: COMPARE[sign](figures[name], bound) for name, (sign, bound) in targets.items()}
    bounds = {name: f"{sign} {bound}" for name, (sign, bound) in targets.items()}
    if not args.json:
        for name, value in figures.items():
            verdict = f"   target {bounds[name]}: {'met' if met[name] else 'MISSED'}" if name in bounds else ""
            print(f"{name:32} {value:12.5g}{verdict}")
    print(json.dumps({"name": args.name, "figures": figures, "targets": bounds, "ok": all(met.values())}))
    return 0 if all(met.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
