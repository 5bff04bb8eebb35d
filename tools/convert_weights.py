"""Published weights in and out, as files: `python tools/convert_weights.py [--from FORMAT] [--to FORMAT] IN OUT`.

IN has weights of DiT, SiT, REPA's SiT, GroupDiff or JiT (.pt, .pth, .safetensors); OUT is one .safetensors file, for
init_from and sample.py --weights, and a config beside it, OUT with .yaml, for submit.py and sample.py. With --to
diffusers OUT is a folder of its DiTTransformer2DModel, with --to jit a .pth file as JiT's code writes it; IN may then
also be a file that this tool, export_weights.py or reconstruct_ema.py has written (--from ours).
"""

import argparse
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml
from command_line import HelpFormatter, run_tool
from torch import Tensor

from data.sets.form import ImageForm
from data.stores.files import appearing_path
from models.backbones.registry import model_config
from models.paths.registry import path_config
from models.pretrained.jit_weights import to_jit
from models.pretrained.published import CLASSES, EQUAL, FORMATS, Published, convert, recognise, to_diffusers
from trainer.build import open_data
from trainer.checkpoints.tensor_files import read_arguments, read_tensors
from trainer.checkpoints.weights import check_out, find_weights, form_as_metadata, form_in, read_metadata, save_weights
from trainer.config.converted import ready_config
from trainer.config.legacy import upgrade
from trainer.config.tree import parse_config
from trainer.errors import NOT_LOADED, RunError, first_line


def main(arguments: list[str]) -> None:
    """Convert, write, and say what a user must set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("file", type=Path, metavar="IN", help="a .pt, .pth or .safetensors file")
    parser.add_argument(
        "out", type=Path, metavar="OUT", help="a new .safetensors file; of jit: .pth; of diffusers: a folder"
    )
    parser.add_argument(
        "--from", dest="kind", choices=(*FORMATS, "ours"), help="what IN has; default: told by names and values"
    )
    parser.add_argument("--to", choices=("ours", "diffusers", "jit"), default="ours", help="what OUT gets")
    parser.add_argument(
        "--part", metavar="NAME", help="which network of IN, as model_ema2; default: the (first) average, or else model"
    )
    args = parser.parse_args(arguments)
    config_file = args.out.with_suffix(".yaml")
    if args.to == "ours":
        check_out(args.out)
        if config_file.exists():
            raise RunError(f"{config_file}: is there, but is to be the config of {args.out.name}; give another name")
    elif args.out.exists() or (args.to == "jit" and args.out.suffix != ".pth"):
        raise RunError(
            f"{args.out}: must be a new {'folder' if args.to == 'diffusers' else '.pth file'}; give another name"
        )
    if args.file.is_dir():
        raise RunError(f"{args.file}: a folder; give a file, as tools/export_weights.py writes one of a run")

    file = find_weights(args.file)
    weights = {name: tensor.float() for name, tensor in read_tensors(file, part=args.part).items()}
    metadata = read_metadata(file)
    try:
        kind = args.kind or recognise(weights)
        if kind == "ours":
            config = read_config(metadata, args.to)
        else:
            weights, config = convert(weights, kind, read_arguments(file))
        if args.to == "diffusers":
            write_diffusers(weights, config, args.out, args.file, form_in(metadata))
        elif args.to == "jit":
            write_jit(weights, config, args.out, args.file, form_in(metadata))
        else:
            text = yaml.safe_dump(config, sort_keys=False)
            about = {"converted_from": f"{kind}, {args.file}", "config": text}
            save_weights(weights, args.out, about | form_as_metadata(published_form(weights, config)), args.file)
            unknown = not_told(config["model"])
            write_config(ready_config(kind, Published(weights, config), args.out), unknown, config_file, args.file)
            print(f"{args.out}: from {kind}, {len(weights[CLASSES]) - 1} classes; a config for it has\n{text}", end="")
            for field in unknown:
                print(f"# and model.{field}, which the file does not tell")
            print(f"# {config_file}: the whole config, for tools/submit.py and tools/sample.py")
    except (ValueError, yaml.YAMLError) as error:
        raise RunError(f"{args.file}: {' '.join(str(error).split())}") from None


def read_config(metadata: dict[str, str], to: str) -> dict:
    """The tree of a config, of a run or in part, of which a file of ours says that it is."""
    if to == "ours":
        raise ValueError("has our names already; set --to diffusers or jit, or --from to what it is")
    tree = yaml.safe_load(metadata.get("config", ""))
    if not (isinstance(tree, dict) and {"path", "data", "model"} <= tree.keys()):
        raise ValueError("does not say of which config it is; give a file as tools/export_weights.py writes it")
    return upgrade(tree)


def not_told(model: dict) -> list[str]:
    """Return the fields of the model that neither the weights nor a published size tell."""
    if "size" in model:
        return []
    return ["context_start"] if model.get("backbone") == "jit" else ["heads"]


@contextmanager
def new_file(out: Path, like: Path) -> Iterator[Path]:
    """Give a path to write to, which becomes `out` when it is whole, with the permissions of the file `like`."""
    try:
        with appearing_path(out) as partial:
            yield partial
            shutil.copymode(like, partial)
    except OSError as error:
        raise RunError(f"{out}: cannot be written ({first_line(error)}); give another place") from None


def write_config(tree: dict, unknown: list[str], out: Path, like: Path) -> None:
    """Write a config, which all may read who may read the file `like`, with a line for each field to be filled in."""
    lines = [f"# Of converted weights: tools/sample.py {out} --weights {tree['init_from']}, tools/submit.py {out}\n"]
    lines += [f"# model.{field}: set it; the file did not tell\n" for field in unknown]
    with new_file(out, like) as partial:
        partial.write_text("".join(lines) + yaml.safe_dump(tree, sort_keys=False))


def published_form(weights: dict[str, Tensor], config: dict) -> ImageForm | None:
    """Return the form of the images of published weights, which do not name their VAE; None if the side is unknown."""
    channels, side = config["data"].get("channels"), config["data"].get("side")
    return ImageForm((channels, side, side), len(weights[CLASSES]) - 1, None) if channels and side else None


def side_of(config: dict, form: ImageForm | None) -> int:
    """Return the side of the images that a network of ours makes. Raise ValueError if nothing tells it."""
    if side := form.shape[-1] if form else config["data"].get("side"):
        return side
    if "run" not in config:
        raise ValueError("had no pos_embed, so the side of its images is not known; convert a file that has it")
    return open_data(parse_config(config)).shape[-1]  # a file of an older version


def write_jit(weights: dict[str, Tensor], config: dict, out: Path, like: Path, form: ImageForm | None) -> None:
    """Write the file, which all may read who may read the file `like`, and print how JiT's code loads it."""
    model, path = model_config(config["model"]), path_config(config["path"])
    converted = to_jit(weights, model, path, side_of(config, form))
    with new_file(out, like) as partial:
        torch.save({"model": converted, "model_ema1": converted, "model_ema2": converted}, partial)
    print(f"{out}: for JiT's main_jit.py --resume FOLDER --evaluate_gen, as checkpoint-last.pth in FOLDER")


def write_diffusers(weights: dict[str, Tensor], config: dict, out: Path, like: Path, form: ImageForm | None) -> None:
    """Write the folder, which all may read who may read the file `like`, and print how to load it."""
    model, path = model_config(config["model"]), path_config(config["path"])
    if "heads" not in model.model_fields_set:
        sizes = f"depth={model.depth}, width={model.width}"
        raise ValueError(f"{sizes}: no published size, so the heads are not known; give weights of a run of ours")
    settings, converted = to_diffusers(weights, model, path, side_of(config, form))

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
