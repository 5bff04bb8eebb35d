"""The config of converted weights, ready to train on and to sample with."""

from pathlib import Path

from models.pretrained.published import Published

PIXELS = (1, 3)  # channels of images that are not latents
VAES = {"groupdiff": "stabilityai/sd-vae-ft-mse"}
SCALING = 0.18215  # of Stable Diffusion's VAE, whose latents have 4 channels
GUIDED = {"dit": 3, "sit": 3}  # channels, from the first, that the public code guides; elsewhere all
SAMPLERS = {"ddpm": {"sampler": "ddpm", "steps": 250}, "jit": {"sampler": "heun", "steps": 50}}
GUIDANCE = {  # of the published samples, by format and path
    ("dit", "ddpm"): {"guidance": 1.5},
    ("sit", "linear"): {"guidance": 1.5},
    ("repa", "linear"): {"guidance": 1.8, "interval": [-1.6946, None]},  # of t from 0.3 on
    ("groupdiff", "ddpm"): {"guidance": 1.65},
    ("groupdiff", "linear"): {"guidance": 2.585, "interval": [-2.1973, 2.1973]},  # of t from 0.25 to 0.75
}
JIT_GUIDANCE = {"B": (3.0, 3.0), "L": (2.4, 2.5), "H": (2.2, 2.3)}  # by size, at 256 and 512 pixels


def ready_config(kind: str, published: Published, weights: Path) -> dict:
    """Return the tree of a config for these weights of a format, which are in a file. The folders of data are those of
    configs/imagenet256. Heads are missing if they are not known."""
    path, data, model = (dict(published.config[part]) for part in ("path", "data", "model"))
    slots = model["max_group_size"]
    return {
        "init_from": str(weights.absolute()),
        "path": path,
        "data": _data(kind, data, grouped=slots > 1),
        "model": model,
        "groups": {"variant": "light", "size": min(slots, 4)} if slots > 1 else {"variant": "none", "size": 1},
        "sample": _sample(kind, path, data, model),
    }


def _data(kind: str, data: dict, grouped: bool) -> dict:
    name = "pixels" if data["channels"] in PIXELS else "latents"
    found = {"name": name, name: f"/data/{name}"} | data
    if grouped:
        found["neighbors"] = "/data/neighbors"
    if name == "latents" and data["channels"] == 4:
        found |= {"scaling": SCALING, "vae": VAES.get(kind, "stabilityai/sd-vae-ft-ema")}
    return found


def _sample(kind: str, path: dict, data: dict, model: dict) -> dict:
    name = path["name"]
    found = dict(SAMPLERS.get(name, {"sampler": "sde", "steps": 250}))
    if name == "jit":
        small, large = JIT_GUIDANCE.get(model.get("size", ""), (1.5, 1.5))
        low = {1.0: -4.3944, 2.0: -5.7807}.get(path["noise_scale"])  # of t above 0.1
        found |= {"guidance": large if data["side"] > 256 else small} | ({"interval": [low, None]} if low else {})
    else:
        found |= GUIDANCE.get((kind, name), {})
    return found | ({"guided_channels": GUIDED[kind]} if kind in GUIDED else {})
