"""Convert published weights, as tensors by name, to our names and layouts, and ours to those of diffusers.

DiT, SiT, REPA and GroupDiff name their tensors as DiT does (github.com/facebookresearch/DiT, models.py), and so do we.
They differ from ours in the patch embedding (theirs is a convolution), in what they hold besides the network, and in
the direction of time. JiT's weights are in jit_weights.py.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.backbones.base import BackboneConfig
from models.backbones.dit import DiT
from models.backbones.sample_embedding import CLASSES, SLOTS, Weights, fold
from models.paths.base import PathConfig
from models.pretrained import jit_weights
from models.pretrained.fitting import POSITIONS, blocks_of, cells_of, check_fit, check_plain, rows, with_size

PATCHES, TIME = "x_embedder.proj.weight", "t_embedder.mlp.0.weight"
LAST = ("final_layer.linear.weight", "final_layer.linear.bias")
PREFIX = {"groupdiff": "denoiser."}  # of all names in a format
BESIDES = {"repa": "projectors."}  # prefix of names that are not part of the network


class Published(NamedTuple):
    """A network in our names and layouts, and its config sections path, data and model."""

    weights: Weights
    config: dict[str, dict]


def first_half(weights: Weights, patch: int, channels: int) -> Weights:
    """Return the last layer without the second half of the predicted channels, which SiT's forward drops."""
    return {name: _by_channel(weights[name], patch, channels)[:, 0].flatten(0, 1) for name in LAST}


def turn_time(weights: Weights, patch: int, channels: int) -> Weights:
    """Given a network that predicts dx/ds at s = 1 - t, return the weights that change for dx/dt at t. The sine and
    cosine of (1 - t) f are linear combinations of those of t f, so only the first layer of the time embedding (in
    float64) and the sign of the last layer change."""
    of_cos, of_sin = weights[TIME].double().chunk(2, dim=1)
    half = of_cos.shape[1]
    frequencies = 10000.0 ** -(torch.arange(half, dtype=torch.float64) / half)
    cos, sin = frequencies.cos(), frequencies.sin()
    turned = torch.cat([of_cos * cos + of_sin * sin, of_cos * sin - of_sin * cos], dim=1)
    return {TIME: turned.to(weights[TIME].dtype), **{name: -weights[name] for name in LAST}}


KINDS: dict[tuple[str, int], tuple[str, Callable[[Weights, int, int], Weights] | None]] = {
    ("dit", 2): ("ddpm", None),
    ("dit", 1): ("ddpm", None),
    ("sit", 2): ("linear", first_half),
    ("sit", 1): ("linear", None),
    ("repa", 1): ("linear", turn_time),
    ("groupdiff", 2): ("ddpm", None),
    ("groupdiff", 1): ("linear", turn_time),
}
"""By format and number of predictions per channel: our path, and what changes besides the layout.

DiT is facebookresearch/DiT; SiT is willisma/SiT, where t = 1 is data, as here. REPA is sihyun-yu/REPA, which
GroupDiff's SiT builds on: x_t = (1 - t) x + t noise, and the network predicts noise - x. The published weights are for
the linear path; weights trained on another one (REPA's cosine is our gvp) convert in the same way.
"""
FORMATS = (*dict.fromkeys(name for name, _ in KINDS), "jit")
PATH_TYPES = {"linear": "linear", "gvp": "gvp", "cosine": "gvp", "vp": "vp"}  # of SiT's and REPA's path_type


def recognise(weights: Weights) -> str:
    """Return one of FORMATS, or "ours". DiT and SiT differ only in values: the half that SiT drops is never trained,
    hence 0. Raise ValueError if the format cannot be determined."""
    for kind, mark in (PREFIX | BESIDES).items():
        if any(name.startswith(mark) for name in weights):
            return kind
    for name in (PATCHES, jit_weights.FIRST):
        if name in weights and weights[name].dim() == 2:
            return "ours"
    if jit_weights.FIRST in weights or jit_weights.PREFIX + jit_weights.FIRST in weights:
        return "jit"
    patch, channels, predictions = _sizes(weights, "dit, sit, repa, groupdiff or jit")
    if predictions == 1:
        raise ValueError(f"{LAST[0]} predicts no variance, as dit, sit and repa may: say --from which it is")
    return "dit" if _by_channel(weights[LAST[0]], patch, channels)[:, 1].any() else "sit"


def convert(weights: Weights, kind: str, arguments: Mapping[str, Any] | None = None) -> Published:
    """Return weights of one of FORMATS as ours, given the arguments of the run that made them, if it is known. Raise
    ValueError with the name of the first tensor that is missing, unexpected, or of the wrong shape."""
    arguments = arguments or {}
    if kind == "jit":
        return Published(*jit_weights.from_jit(weights, arguments))
    prefix, besides = PREFIX.get(kind, ""), BESIDES.get(kind)
    for name in weights:
        if not name.startswith(prefix) and name != SLOTS:
            raise ValueError(f"{name} is unexpected in weights of {kind}, whose names begin with {prefix}")
    kept = {name: tensor for name, tensor in weights.items() if not (besides and name.startswith(besides))}
    found = _join_blocks({name.removeprefix(prefix): tensor for name, tensor in kept.items()})

    patch, channels, predictions = _sizes(found, kind)
    if (kind, predictions) not in KINDS:
        raise ValueError(f"{LAST[0]} predicts {predictions} numbers a channel; weights of {kind} do not")
    path, change = KINDS[kind, predictions]
    if path == "linear":
        path = _path_of(arguments)
    found[PATCHES] = found[PATCHES].flatten(1)
    positions = found.pop(POSITIONS, None)
    model = _describe(found, patch)
    if model["width"] % 4:
        raise ValueError(f"{PATCHES} has {model['width']} rows; the width must be a multiple of 4")
    check_fit(found, DiT, DiT.Config(**model, heads=1), channels, predictions, kind)

    data = {"channels": channels}
    if positions is not None:
        data["side"] = patch * cells_of(positions, model["width"])
    found |= change(found, patch, channels) if change else {}
    about = {"name": path} | ({"learns_variance": predictions == 2} if path == "ddpm" else {})
    model = with_size(model, DiT.Config.sizes) | {"time_scale": 1.0}  # all formats embed the path's own times
    config = {"path": about, "data": data, "model": model}
    return Published({name: tensor.contiguous() for name, tensor in found.items()}, config)


def _path_of(arguments: Mapping[str, Any]) -> str:
    """Return our path of SiT's or REPA's arguments. Raise ValueError for one that we do not have."""
    kind, prediction = str(arguments.get("path_type", "linear")).lower(), arguments.get("prediction", "velocity")
    if kind not in PATH_TYPES:
        raise ValueError(f"path_type={kind}: none of {', '.join(PATH_TYPES)}, which can be converted")
    if prediction not in ("velocity", "v"):
        raise ValueError(f"prediction={prediction}: only weights that predict the velocity can be converted")
    return PATH_TYPES[kind]


def _by_channel(tensor: Tensor, patch: int, channels: int) -> Tensor:
    """Return the last layer's weight or bias as (cells of a patch, predictions per channel, channels, ...)."""
    return tensor.unflatten(0, (patch * patch, -1, channels))


def _join_blocks(weights: Weights) -> Weights:
    """Rename decoder_blocks, which REPA's older files count from 0 after the projectors, to blocks."""
    first = len(blocks_of(weights))

    def joined(name: str) -> str:
        return re.sub(r"^decoder_blocks\.(\d+)", lambda found: f"blocks.{int(found[1]) + first}", name)

    return {joined(name): tensor for name, tensor in weights.items()}


def _sizes(weights: Weights, kind: str) -> tuple[int, int, int]:
    """Return (side of a patch, channels of an image, predictions per channel)."""
    for name in (PATCHES, LAST[0]):
        if name not in weights:
            raise ValueError(f"{name} is missing: not weights of {kind}")
    shape = tuple(weights[PATCHES].shape)
    if len(shape) != 4 or shape[2] != shape[3] or 0 in shape:
        raise ValueError(f"{PATCHES} is {shape}; weights of {kind} have a convolution, (width, channels, patch, patch)")
    _, channels, patch, _ = shape
    predictions, rest = divmod(rows(weights, LAST[0]), channels * patch * patch)
    if rest or predictions not in (1, 2):
        one = channels * patch * patch
        raise ValueError(f"{LAST[0]} is {tuple(weights[LAST[0]].shape)}; must have {one} or {2 * one} rows")
    return patch, channels, predictions


def _describe(weights: Weights, patch: int) -> dict:
    """Return the fields of DiT.Config that weights determine: all but the heads."""
    width, depth = len(weights[PATCHES]), max(len(blocks_of(weights)), 1)
    ratio = rows(weights, "blocks.0.mlp.fc1.weight") / width
    slots = rows(weights, SLOTS) if SLOTS in weights else 0
    return {"depth": depth, "width": width, "patch": patch, "mlp_ratio": ratio, "max_group_size": slots}


OUTSIDE = {
    "pos_embed.proj": "x_embedder.proj",
    "proj_out_1": "final_layer.adaLN_modulation.1",
    "proj_out_2": "final_layer.linear",
}
IN_BLOCK = {
    "norm1.linear": "adaLN_modulation.1",
    "attn1.to_out.0": "attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}
IN_EACH_BLOCK = {
    "norm1.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "norm1.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
}
"""diffusers' name of a layer: our name. Each block of diffusers has its own copy of the time and class embeddings."""
EQUAL = "for block in transformer.transformer_blocks: block.norm1.emb.time_proj.downscale_freq_shift = 0"
"""Makes diffusers' class embed time as DiT does; otherwise its frequencies are 10000^(-i/127), not 10000^(-i/128)."""


def to_diffusers(weights: Weights, config: BackboneConfig, path: PathConfig, side: int) -> tuple[dict, Weights]:
    """Return (arguments, weights) of diffusers' DiTTransformer2DModel, which equals this network once EQUAL is applied.
    A sample embedding of one row is folded. Raise ValueError if diffusers' class cannot represent the network."""
    wanted = {
        "path": "ddpm",
        "model.backbone": "dit",
        "model.mlp_ratio": 4.0,
        "model.time_scale": 1.0,
        "model.attention": "softmax",
        "model.mlp": "gelu",
        "model.wrap": (),
    }
    check_plain("diffusers' DiT", path, config, wanted)
    cell, predictions = config.patch**2, path.predictions
    channels = weights[PATCHES].shape[-1] // cell if PATCHES in weights else 1
    check_fit(weights, DiT, config, channels, predictions, "ours")
    weights = fold(weights) if config.slots else weights
    arguments = {
        "num_attention_heads": config.heads,
        "attention_head_dim": config.width // config.heads,
        "in_channels": channels,
        "out_channels": predictions * channels,
        "num_layers": config.depth,
        "sample_size": side,
        "patch_size": config.patch,
        "num_embeds_ada_norm": len(weights[CLASSES]) - 1,
        "norm_eps": 1e-6,
    }
    layers, out = dict(OUTSIDE), {}
    for i in range(config.depth):
        theirs, ours = f"transformer_blocks.{i}.", f"blocks.{i}."
        layers |= {theirs + name: ours + own for name, own in IN_BLOCK.items()}
        layers |= {theirs + name: own for name, own in IN_EACH_BLOCK.items()}
        out[f"{theirs}norm1.emb.class_embedder.embedding_table.weight"] = weights[CLASSES]
        for kind in ("weight", "bias"):
            qkv = weights[f"{ours}attn.qkv.{kind}"].chunk(3)
            out |= {f"{theirs}attn1.to_{name}.{kind}": part for name, part in zip("qkv", qkv, strict=True)}
    out |= {f"{name}.{kind}": weights[f"{own}.{kind}"] for name, own in layers.items() for kind in ("weight", "bias")}
    out["pos_embed.proj.weight"] = weights[PATCHES].unflatten(1, (-1, config.patch, config.patch))
    return arguments, out
