"""Claims of the method, run again: `python tools/ablate.py CONFIG --axis groups.size=1,2,4,8 --seeds 3`.

For each value of each axis and each seed: train, sample along a guidance curve, measure. One table and plots come out.
Here in some processes, or on Slurm as a job array; kill it at any time, the same command resumes.
"""

import argparse
import json
from pathlib import Path

from command_line import HelpFormatter, add_cluster_options, numbers, positive, run_tool
from preprocessing import run_in_processes

from trainer.ablation.runs import check_results, correlations, plan_cells, run_cells, summarise, table


def main(arguments: list[str]) -> None:
    """Run what is missing, and write ablation.json, .md and .svg."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("words", nargs="+", metavar="CONFIG field=value", help="the config of all runs")
    parser.add_argument(
        "--axis", action="append", required=True, metavar="field=a,b,c", help="values of a field, each on its own"
    )
    parser.add_argument("--seeds", type=positive, default=3, metavar="N", help="runs for each value")
    parser.add_argument(
        "--guidance", type=numbers, default="1,1.5,2,3", metavar="N,N", help="weights at which each run is measured"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where runs and results go")
    add_cluster_options(parser)
    args = parser.parse_intermixed_args(arguments)
    out = args.out.absolute()
    cells, configs = plan_cells(Path(args.words[0]), args.words[1:], args.axis, args.seeds, out)
    check_results(configs, args.guidance, out)
    run_in_processes(args, run_cells, configs=configs, guidance=args.guidance, out=out)
    missing = sum(not (out / f"{name}.json").exists() for name in configs)
    if missing:
        print(f"{out}: {missing} of {len(configs)} runs are missing; the same command resumes them")
        return
    from trainer.ablation.plots import plot_ablation  # matplotlib is slow to import

    rows = summarise(cells, out)
    r = correlations(rows)
    (out / "ablation.json").write_text(json.dumps({"rows": rows, "s_cross_frechet_r": r}, indent=1) + "\n")
    (out / "ablation.md").write_text(table(rows))
    plot_ablation(rows, r, out / "ablation.svg")
    print(
        table(rows) + "".join(f"r of S_cross and Frechet distance at {at}: {value:.2f}\n" for at, value in r.items()),
        end="",
    )


if __name__ == "__main__":
    run_tool(main)
