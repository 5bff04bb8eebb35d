"""Weights by name: read from a run, a checkpoint or a file, loaded into a network to start from, exported."""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from data.sets.form import ImageForm, read_form
from data.stores.files import appearing_path, sync
from models.backbones.sample_embedding import SLOTS, fit, fits
from trainer.checkpoints import folder as checkpoint
from trainer.checkpoints.tensor_files import read_tensors
from trainer.errors import RunError, first_line

EMA, MODEL = "ema", "model"  # parts of a checkpoint: the average that makes samples; weights as they are trained
RAW = "raw"  # how users may call the latter
_PART = re.compile(r"(model|ema([-_]\d+(\.\d+)?(e-\d+)?)?)\.")  # in front of a parameter's name
_GIVE = "give a run folder, one of its checkpoints/*, a .safetensors or a .pt file"


@dataclass(frozen=True)
class WeightSource:
    """Where a network's weights come from: a `part` of a checkpoint, which is an average or "model", the weights in
    training; or a `file`, which needs no checkpoint."""

    checkpoint: Path | None
    part: str = EMA
    file: Path | None = None

    @property
    def weights(self) -> str:
        """Return what records call these weights: the part, as "ema", or the file."""
        return str(self.file) if self.file else self.part

    @property
    def position(self) -> int | None:
        """Return the images seen by the checkpoint; None without one."""
        return checkpoint.read_manifest(self.checkpoint)["position"] if self.checkpoint else None

    def form(self) -> ImageForm | None:
        """Return the form of its images that the checkpoint or file states; None if an older version wrote it."""
        if self.checkpoint:
            manifest = checkpoint.read_manifest(self.checkpoint)
            return read_form(manifest["images"], manifest["data"]) if "images" in manifest else None
        return form_in(read_metadata(self.file)) if self.file else None


def find_source(folder: Path | None, named: str | None = None, raw: bool = False) -> WeightSource:
    """Return the weights that a user names: a file, or a part of the checkpoint `folder`. None: its EMA, or with `raw`
    its weights as they are trained, which is also the part of a file that has both."""
    if named is None or Path(named).is_file():
        return WeightSource(folder, MODEL if raw else EMA, Path(named) if named else None)
    if folder is None:
        raise RunError(f"--weights {named}: no such file; give one that there is")
    if raw:
        raise RunError(f"--raw: not with --weights {named}, which is a part of the checkpoint; leave one of them out")
    part = MODEL if named == RAW else named
    check_part(folder, part)
    return WeightSource(folder, part)


def check_part(folder: Path, part: str) -> None:
    """Raise RunError, which names those that there are, unless a checkpoint has this part: an average, or "model"."""
    found = (_PART.match(name) for name in checkpoint.stored_sizes(folder))
    known = dict.fromkeys(match[1] for match in found if match)
    if part not in known:
        raise RunError(f"--weights {part}: no such file, nor part of {folder}; give {' or '.join(known)}, or a file")


def find_checkpoint(path: Path) -> Path:
    """Return `path` if it is a checkpoint folder, or else the newest complete checkpoint in this run folder."""
    if (path / checkpoint.MANIFEST).is_file():
        return path
    complete, _ = checkpoint.find(path / checkpoint.CHECKPOINTS)
    if not complete:
        raise RunError(f"{path}: no complete checkpoint in it; give a run folder or one of its checkpoints/*")
    return complete[-1]


def place_in_run(checkpoint_folder: Path | None, name: str) -> Path:
    """Return where to write what is made from a checkpoint: `name` in its run folder. Raise RunError without one."""
    if checkpoint_folder is None or checkpoint_folder.parent.name != checkpoint.CHECKPOINTS:
        raise RunError(f"{checkpoint_folder or 'weights'}: not in a run folder; say where to write with --out")
    return checkpoint_folder.parent.parent / name


def find_weights(path: str | Path) -> Path:
    """Return the file or the checkpoint that a path means."""
    path = Path(path)
    if path.is_dir():
        path = find_checkpoint(path)
        checkpoint.check_index(path)
        checkpoint.check_sizes(path)  # the rest is checked when it is loaded
    elif not path.is_file():
        raise RunError(f"{path}: no such file or folder; {_GIVE}")
    elif path.suffix not in (".safetensors", ".pt", ".pth"):
        raise RunError(f"{path}: no kind of file that is known here; {_GIVE}")
    return path


def read_part(folder: Path, part: str, values: bool = True) -> dict[str, Tensor]:
    """Return a checkpoint's part (model, ema, ...): float32 tensors by parameter name; without `values`, shapes."""
    sizes = checkpoint.stored_sizes(folder)
    names = (key.removeprefix(f"{part}.") for key in sizes if key.startswith(f"{part}."))
    tensors = {name: torch.empty(sizes[f"{part}.{name}"]) for name in names}
    if values:
        checkpoint.load(folder, {part: tensors})
    return tensors


def read_weights(path: str | Path, part: str = EMA, values: bool = True) -> dict[str, Tensor]:
    """Return float32 tensors by parameter name: a part of a run's newest checkpoint or of a checkpoint; of a file that
    has several, the EMA, or "model". Without `values`, a checkpoint's tensors are not read: only names and shapes are
    right."""
    path = find_weights(path)
    if path.is_file():
        return {name: tensor.float() for name, tensor in read_tensors(path, part == MODEL).items()}
    return read_part(path, part, values)


def start_from(network: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Copy weights into a whole network; one on the meta device is only compared. The sample embedding, which may be
    longer or absent, is fitted. Raise RunError, which names the first parameter that differs."""
    own = network.state_dict()
    for name in own | weights:
        wanted, found = (tuple(part[name].shape) if name in part else "missing" for part in (own, weights))
        if wanted != found and not (name == SLOTS and fits(weights, own)):
            differs = f"{name} is {found}, the network's is {wanted}"
            fix = f"max_group_size={found[0]}" if name == SLOTS and wanted == "missing" else "* to what they are of"
            raise RunError(f"{source}: {differs}: weights of another model; set model.{fix}")
    for name, tensor in fit(weights, own).items():
        own[name].copy_(tensor)


def export_weights(source: Path, out: Path, part: str = EMA) -> Path:
    """Write a part of a run or checkpoint as one .safetensors file; return the checkpoint it comes from."""
    check_out(out)
    folder = find_checkpoint(source)
    check_part(folder, part)
    write_weights(read_weights(folder, part), out, folder, part)
    return folder


def check_out(out: Path) -> None:
    """Raise RunError unless `out` is a new file of the right kind."""
    if out.suffix != ".safetensors" or out.exists():
        raise RunError(f"{out}: must be a new file that ends in .safetensors; give another name")


def write_weights(weights: dict[str, Tensor], out: Path, folder: Path, kind: str) -> None:
    """Write a .safetensors file, whole or not at all, that names the checkpoint folder and weights it comes from."""
    config, manifest = folder / "config.yaml", checkpoint.read_manifest(folder)
    about = {"position": str(manifest["position"]), "config": config.read_text(), "weights": kind}
    save_weights(weights, out, about | form_as_metadata(WeightSource(folder).form()), config)


def save_weights(weights: dict[str, Tensor], out: Path, metadata: dict[str, str], like: Path) -> None:
    """Write a .safetensors file, whole or not at all, readable by everyone who may read the file `like`."""
    try:
        with appearing_path(out) as partial:
            save_file(weights, partial, metadata)
            shutil.copymode(like, partial)
            with partial.open("rb") as file:
                sync(file)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{out}: cannot be written ({first_line(error)}); give another place") from None


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of an intact .safetensors file; {} for other files."""
    if path.suffix != ".safetensors":
        return {}
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def form_as_metadata(form: ImageForm | None) -> dict[str, str]:
    """Return the metadata that state the form of the images; {} if it is not known."""
    return {"images": json.dumps(form.as_record())} if form else {}


def form_in(metadata: dict[str, str]) -> ImageForm | None:
    """Return the form of the images that a file's metadata state, if any."""
    return read_form(json.loads(metadata["images"])) if "images" in metadata else None
