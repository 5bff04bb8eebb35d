"""How images of a group attend to one another: `python tools/attention_score.py RUN` writes JSON and pictures."""

import argparse
import json
from pathlib import Path

from command_line import HelpFormatter, add_weights_options, positive, run_tool
from tqdm import tqdm

from trainer.analysis import attention_plots as plots
from trainer.analysis.attention import data_attention, draw_groups, load_grouped, one_group, sampling_attention
from trainer.analysis.cross_attention import as_record
from trainer.checkpoints.weights import find_checkpoint, find_source, place_in_run
from trainer.config.tree import change_config
from trainer.run_folder import read_config


def main(arguments: list[str]) -> None:
    """Measure a checkpoint and write attention_score.json, .png, attention_images.png and attention_patch.png."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_weights_options(parser)
    parser.add_argument("--during", choices=("data", "sampling"), default="data", help="noisy real groups, or sampling")
    parser.add_argument(
        "--query", choices=("similarity", "class", "random"), help="what groups have in common; default: as trained"
    )
    parser.add_argument("--groups", type=positive, default=256, metavar="N", help="at most so many groups")
    parser.add_argument(
        "--patch",
        type=int,
        nargs=4,
        metavar=("GROUP", "IMAGE", "ROW", "COLUMN"),
        help="whose attention is shown; default: in the middle of the first image",
    )
    parser.add_argument("--log-snr", type=float, default=0.0, metavar="N", help="at which the patch is shown")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="where to write; default: RUN/attention/QUERY, or /sampling"
    )
    args = parser.parse_args(arguments)

    folder = find_checkpoint(args.run)
    config = change_config(read_config(folder), [f"groups.query={args.query}"] if args.query else [])
    query = config.groups.query
    out = args.out or place_in_run(folder, f"attention/{query if args.during == 'data' else 'sampling'}")

    source = find_source(folder, args.weights, args.raw)
    loaded = load_grouped(source, config)
    groups = draw_groups(config, args.groups)
    middle = loaded.images.shape[-1] // config.model.patch // 2
    patch = args.patch or (0, 0, middle, middle)
    shown = one_group(loaded, groups, patch, args.log_snr)
    with tqdm(unit="img", desc="attention") as bar:
        if args.during == "data":
            size, attention = config.groups.size, data_attention(loaded, groups, bar.update)
        else:
            size, attention = config.sample.group_size, sampling_attention(loaded, args.groups, bar.update)

    out.mkdir(parents=True, exist_ok=True)
    plots.save(plots.level_map(attention, size), out / "attention_score.png")
    plots.save(plots.image_map(shown, f"group {patch[0]}, query {query}"), out / "attention_images.png")
    plots.save(plots.patch_map(shown, *patch[1:]), out / "attention_patch.png")
    record = {
        "checkpoint": str(folder),
        "position": source.position,
        "weights": source.weights,
        "during": args.during,
        "groups": int(attention.groups.sum()) if args.during == "data" else args.groups,
        "group_size": size,
    }
    if args.during == "data":
        record |= {"query": query, "fallbacks": groups.fallbacks}
    else:
        record |= {"sample": config.sample.model_dump()}
    record |= as_record(attention, size)
    (out / "attention_score.json").write_text(json.dumps(record, indent=1) + "\n")
    uniform = f"{record['uniform_cross_share']:.4f} if uniform"
    s_cross, share = attention.mean_s_cross, attention.mean_cross_share
    print(f"{out}: N={size}: S_cross {s_cross:.4f}, cross share {share:.4f} ({uniform})")


if __name__ == "__main__":
    run_tool(main)
