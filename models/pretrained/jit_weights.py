"""JiT's published weights (github.com/LTH14/JiT: denoiser.py, model_jit.py) as ours, and ours as JiT's.

Names are the same behind the prefix `net.`. The two layers of the patch embedding are convolutions there, the class
tokens' own embedding has a leading dimension of 1, and the fixed positions are stored.
"""

import math
from collections.abc import Mapping
from typing import Any

from models.backbones.base import BackboneConfig
from models.backbones.embeddings import sincos_positions
from models.backbones.jit import JiT
from models.backbones.sample_embedding import CONTEXT, SLOTS, Weights, fold
from models.paths.base import PathConfig
from models.pretrained.fitting import POSITIONS, blocks_of, cells_of, check_fit, check_plain, rows, with_size

PREFIX = "net."
FIRST, SECOND = "x_embedder.proj1.weight", "x_embedder.proj2.weight"
QUERIES, HIDDEN = "blocks.0.attn.q_norm.weight", "blocks.0.mlp.w3.weight"
DROPOUT = {"H": 0.2, "G": 0.2}  # table 9 of arXiv 2511.13720; the weights do not tell


def from_jit(weights: Weights, arguments: Mapping[str, Any]) -> tuple[Weights, dict[str, dict]]:
    """Return weights as ours, and the config sections path, data and model. What the weights do not tell is as in the
    `arguments` of the run, if they say, or else as published: the noise of side / 256, dropout by size. Sizes that are
    not published lack context_start. Raise ValueError with the name of the first tensor that does not fit."""
    found = {name.removeprefix(PREFIX): tensor for name, tensor in weights.items()}
    for name in (FIRST, SECOND, POSITIONS, QUERIES, HIDDEN):
        if name not in found:
            raise ValueError(f"{name} is missing: not weights of jit")
    shape = tuple(found[FIRST].shape)
    if len(shape) != 4 or shape[2] != shape[3] or 0 in shape:
        raise ValueError(f"{FIRST} is {shape}; weights of jit have a convolution, (bottleneck, channels, patch, patch)")
    bottleneck, channels, patch, _ = shape
    width, context = rows(found, SECOND), found.get(CONTEXT)
    found[FIRST], found[SECOND] = found[FIRST].flatten(1), found[SECOND].flatten(1)
    if context is not None:
        found[CONTEXT] = context.flatten(0, 1)
    positions = found.pop(POSITIONS)
    sizes = {
        "depth": len(blocks_of(found)),
        "width": width,
        "heads": max(width // rows(found, QUERIES), 1),
        "patch": patch,
        "mlp_ratio": _unrounded(found[HIDDEN].shape[-1], width) / width,
        "bottleneck": bottleneck,
        "context_tokens": 0 if context is None else len(found[CONTEXT]),
        "max_group_size": rows(found, SLOTS) if SLOTS in found else 0,
    }
    check_fit(found, JiT, JiT.Config(**sizes, context_start=0), channels, 1, "jit")
    side = patch * cells_of(positions, width)
    model = {"backbone": "jit"} | with_size(sizes, JiT.Config.sizes) | {"time_scale": 1.0}
    dropout = float(arguments.get("proj_dropout", DROPOUT.get(str(model.get("size")), 0.0)))
    noise_scale = float(arguments.get("noise_scale", max(side / 256, 1.0)))
    config = {
        "path": {"name": "jit", "noise_scale": noise_scale},
        "data": {"channels": channels, "side": side},
        "model": model | ({"dropout": dropout} if dropout else {}),
    }
    return {name: tensor.contiguous() for name, tensor in found.items()}, config


def _unrounded(hidden: int, width: int) -> int:
    """Return the number of which SwiGLU takes 2/3, rounded down to `hidden`: if possible, a multiple of the width."""
    possible = range(math.ceil(1.5 * hidden), math.ceil(1.5 * (hidden + 1)))
    return next((number for number in possible if number % width == 0), possible[0])


def to_jit(weights: Weights, config: BackboneConfig, path: PathConfig, side: int) -> Weights:
    """Return weights as JiT's Denoiser has them, with a sample embedding of one row folded. Raise ValueError if JiT's
    class cannot represent the network."""
    wanted = {
        "path": "jit",
        "model.backbone": "jit",
        "model.time_scale": 1.0,
        "model.attention": "softmax",
        "model.mlp": "swiglu",
        "model.wrap": (),
    }
    check_plain("JiT's class", path, config, wanted)
    channels = weights[FIRST].shape[-1] // config.patch**2 if FIRST in weights else 1
    check_fit(weights, JiT, config, channels, 1, "ours")
    out = dict(fold(weights) if config.slots else weights)
    out[FIRST] = out[FIRST].unflatten(1, (channels, config.patch, config.patch))
    out[SECOND] = out[SECOND][:, :, None, None]
    if CONTEXT in out:
        out[CONTEXT] = out[CONTEXT][None]
    out[POSITIONS] = sincos_positions(config.width, side // config.patch)[None]
    return {PREFIX + name: tensor.contiguous() for name, tensor in out.items()}
