"""Tensors by name from a file of any origin: .safetensors, or what torch.save wrote of tensors alone."""

import argparse
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from trainer.errors import RunError, first_line

PARTS = ("ema", "model_ema", "model_ema1", "model", "state_dict")  # of a file, the first that there is; averages first
RAW = ("model", "state_dict")
WRAPPERS = ("module", "_orig_mod")  # of DistributedDataParallel and torch.compile, anywhere in a name


def read_tensors(path: Path, raw: bool = False, part: str | None = None) -> dict[str, Tensor]:
    """Return the tensors of a file, mapped into memory: read when they are used. Of a file that has several networks,
    return its average, with `raw` its weights as they are trained, or the `part` of this name. Names are without those
    of wrappers."""
    found, parts = _load(path), (part,) if part else RAW if raw else PARTS
    if isinstance(found, dict):
        whole = None if part else found
        found, known = next((found[name] for name in parts if isinstance(found.get(name), dict)), whole), found
        if found is None:
            named = [str(name) for name, value in known.items() if isinstance(value, dict)]
            raise RunError(f"{path}: has no part {part}; it has {', '.join(named) or 'no parts: leave --part out'}")
    if not (isinstance(found, dict) and all(isinstance(tensor, Tensor) for tensor in found.values())):
        raise RunError(f"{path}: no dict of tensors, nor one with such a dict as {', '.join(parts)}; save one")
    tensors = {_unwrapped(str(name)): tensor for name, tensor in found.items()}
    if len(tensors) < len(found):
        raise RunError(f"{path}: has tensors that differ in {' and '.join(WRAPPERS)} alone; give a file of one network")
    return tensors


def read_arguments(path: Path) -> dict[str, Any]:
    """Return the arguments of the run that wrote a file, as published codes store them; {} if it has none."""
    found = _load(path)
    arguments = found.get("args") if isinstance(found, dict) else None
    return vars(arguments) if isinstance(arguments, argparse.Namespace) else {}


def _unwrapped(name: str) -> str:
    return ".".join(word for word in name.split(".") if word not in WRAPPERS)


def _load(path: Path) -> Any:
    """Return what a file holds. Raise RunError unless it is tensors, numbers and text in dicts and lists."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # a Namespace, which published checkpoints have, only gets attributes; warnings are of pickles refused below
        with warnings.catch_warnings(action="ignore"), torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # an unpickler may raise anything at damaged bytes
        code = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        cause = first_line(error).partition(". ")[0]
        wrong = f"refused, for {code[1]} in it would execute code" if code else f"damaged, or of another kind ({cause})"
        raise RunError(f"{path}: {wrong}; give a file of tensors alone") from None
