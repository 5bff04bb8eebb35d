"""Published weights in and out, as files: `python tools/convert_weights.py [--from FORMAT] [--to FORMAT] IN OUT`.

IN has weights of DiT, SiT, REPA's SiT or GroupDiff (.pt, .pth, .safetensors); OUT is one .safetensors file, for
init_from and sample.py --weights. With --to diffusers OUT is a folder of its DiTTransformer2DModel, and IN may also be
a file that this tool, export_weights.py or reconstruct_ema.py has written (--from ours).
"""

import argparse
import shutil
from pathlib import Path

import yaml
from command_line import HelpFormatter, run_tool
from torch import Tensor

from data.sets.form import ImageForm
from data.stores.files import appearing_path
from models.backbones.registry import model_config
from models.paths.registry import path_config
from models.pretrained.published import CLASSES, EQUAL, FORMATS, convert, recognise, to_diffusers
from trainer.build import open_data
from trainer.checkpoints.weights import check_out, form_as_metadata, form_in, read_metadata, read_weights, save_weights
from trainer.config.legacy import upgrade
from trainer.config.tree import parse_config
from trainer.errors import NOT_LOADED, RunError, first_line


def main(arguments: list[str]) -> None:
    """Convert, write, and say what a user must set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("file", type=Path, metavar="IN", help="a .pt, .pth or .safetensors file")
    parser.add_argument("out", type=Path, metavar="OUT", help="a new .safetensors file; of diffusers: a new folder")
    parser.add_argument(
        "--from", dest="kind", choices=(*FORMATS, "ours"), help="what IN has; default: told by names and values"
    )
    parser.add_argument("--to", choices=("ours", "diffusers"), default="ours", help="what OUT gets")
    args = parser.parse_args(arguments)
    if args.to == "ours":
        check_out(args.out)
    elif args.out.exists():
        raise RunError(f"{args.out}: must be a new folder; give another name")
    if args.file.is_dir():
        raise RunError(f"{args.file}: a folder; give a file, as tools/export_weights.py writes one of a run")

    weights, metadata = read_weights(args.file), read_metadata(args.file)
    try:
        kind = args.kind or recognise(weights)
        if kind == "ours":
            config = read_config(metadata, args.to)
        else:
            weights, config = convert(weights, kind)
        if args.to == "diffusers":
            write_diffusers(weights, config, args.out, args.file, form_in(metadata))
        else:
            text = yaml.safe_dump(config, sort_keys=False)
            about = {"converted_from": f"{kind}, {args.file}", "config": text}
            save_weights(weights, args.out, about | form_as_metadata(published_form(weights, config)), args.file)
            print(f"{args.out}: from {kind}, {len(weights[CLASSES]) - 1} classes; a config for it has\n{text}", end="")
            if "heads" not in model_config(config["model"]).model_fields_set:
                print("# and model.heads, which the file does not tell")
    except (ValueError, yaml.YAMLError) as error:
        raise RunError(f"{args.file}: {' '.join(str(error).split())}") from None


def read_config(metadata: dict[str, str], to: str) -> dict:
    """The tree of a config, of a run or in part, of which a file of ours says that it is."""
    if to == "ours":
        raise ValueError("has our names already; set --to diffusers, or --from to what it is")
    tree = yaml.safe_load(metadata.get("config", ""))
    if not (isinstance(tree, dict) and {"path", "data", "model"} <= tree.keys()):
        raise ValueError("does not say of which config it is; give a file as tools/export_weights.py writes it")
    return upgrade(tree)


def published_form(weights: dict[str, Tensor], config: dict) -> ImageForm | None:
    """Return the form of the images of published weights, which do not name their VAE; None if the side is unknown."""
    channels, side = config["data"].get("channels"), config["data"].get("side")
    return ImageForm((channels, side, side), len(weights[CLASSES]) - 1, None) if channels and side else None


def write_diffusers(weights: dict[str, Tensor], config: dict, out: Path, like: Path, form: ImageForm | None) -> None:
    """Write the folder, which all may read who may read the file `like`, and print how to load it."""
    model, path = model_config(config["model"]), path_config(config["path"])
    if "heads" not in model.model_fields_set:
        sizes = f"depth={model.depth}, width={model.width}"
        raise ValueError(f"{sizes}: no published size, so the heads are not known; give weights of a run of ours")
    side = form.shape[-1] if form else config["data"].get("side")
    if not side:
        if "run" not in config:
            raise ValueError("had no pos_embed, so the side of its images is not known; convert a file that has it")
        side = open_data(parse_config(config)).shape[-1]  # a file of an older version
    settings, converted = to_diffusers(weights, model, path, side)

    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel  # slow to import

    transformer = DiTTransformer2DModel(**settings)
    transformer.load_state_dict(converted)
    try:
        with appearing_path(out, folder=True) as partial:
            transformer.save_pretrained(partial)
            for file in partial.iterdir():
                shutil.copymode(like, file)
    except NOT_LOADED as error:
        raise RunError(f"{out}: cannot be written ({first_line(error)}); give another place") from None
    classes = settings["num_embeds_ada_norm"]
    print(f"{out}: transformer = DiTTransformer2DModel.from_pretrained({str(out)!r}); it embeds time as DiT does after")
    print(EQUAL)
    if classes != 1000:
        print(f"# DiTPipeline guides by label 1000, which is {classes} here: leave guidance_scale at 1")


if __name__ == "__main__":
    run_tool(main)
