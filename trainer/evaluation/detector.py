"""Networks whose features measure images: a TorchScript file like NVlabs's `inception-2015-12-05.pt`, or DINOv2."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, interpolate, linear

from models.pretrained.fingerprint import fingerprint

if TYPE_CHECKING:
    from models.pretrained.encoders import Encoder

# uint8 images (B, 3, H, W) -> "features" (B, d) and, where the network offers them, "spatial" (B, s) and
# "probabilities" (B, classes)
Outputs = dict[str, Tensor]


class Detector:
    """A network with its name and the checksum that identifies it. `kind` is "torchscript" or "dinov2"."""

    def __init__(self, name: str, kind: str, sha256: str, call: Callable[[Tensor], Outputs]) -> None:
        self.name, self.kind, self.sha256, self._call = name, kind, sha256, call

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Outputs:
        """Return fp32 `Outputs` of uint8 (B, C, H, W), grey or RGB. Raise ValueError if they are not finite vectors."""
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            outputs = self._call(images.expand(-1, 3, -1, -1))
        for name, value in outputs.items():
            if value.ndim != 2 or len(value) != len(images) or not value.is_floating_point():
                found = f"{value.dtype} {tuple(value.shape)}"
                raise ValueError(f"its {name} of {len(images)} images are {found}, not (n, d) of floats")
            if not value.isfinite().all():
                raise ValueError(f"its {name} are not finite")
        return {name: value.float() for name, value in outputs.items()}


def load_detector(name: str, device: torch.device) -> Detector:
    """Return the detector of a TorchScript file, or DINOv2 from transformers by its folder or name on the hub.

    Raise OSError, RuntimeError or ValueError if it cannot be loaded or called, or is something else.
    """
    if Path(name).suffix == ".pt" or Path(name).is_file():  # such a name is a file, so the hub need not be asked
        with Path(name).open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        network = torch.jit.load(name, map_location=device).eval()
        return Detector(name, "torchscript", sha256, _script(network, device))
    from models.pretrained.encoders import Encoder  # transformers is slow to import

    encoder = Encoder(name, device)
    return Detector(name, "dinov2", fingerprint(encoder.network), _dinov2(encoder))


def _script(network: torch.jit.ScriptModule, device: torch.device) -> Callable[[Tensor], Outputs]:
    """Return the function from images to outputs of a TorchScript network that gives features, or (features, spatial
    features).

    A network of NVlabs's form takes `return_features`, and `no_output_bias` for class probabilities: the softmax of its
    features times `output.weight`. Its layers are called one by one if that gives the same features as the network,
    because ADM's spatial features (sFID) are inside it: the first 7 channels of mixed_6.conv in the order (y, x,
    channel).
    """
    arguments = {argument.name for argument in network.forward.schema.arguments}
    options = {"return_features": True} if "return_features" in arguments else {}

    def call(images: Tensor) -> Outputs:
        found = network(images, **options)
        if isinstance(found, Tensor):
            return {"features": found}
        if not (isinstance(found, tuple) and len(found) == 2 and all(isinstance(each, Tensor) for each in found)):
            raise ValueError("it gives neither a tensor of features nor (features, spatial features)")
        return {"features": found[0], "spatial": found[1].flatten(1)}

    found = _in_layers(network, call, device) or call
    if "no_output_bias" not in arguments:
        return found
    weight = network.output.weight

    def with_probabilities(images: Tensor) -> Outputs:
        outputs = found(images)
        return outputs | {"probabilities": linear(outputs["features"].to(weight), weight).double().softmax(dim=1)}

    return with_probabilities


def _in_layers(
    network: torch.jit.ScriptModule, call: Callable[[Tensor], Outputs], device: torch.device
) -> Callable[[Tensor], Outputs] | None:
    """Return a function that calls NVlabs's Inception by layers; None without such layers, or if features differ."""
    layers = dict(network.layers.named_children()) if hasattr(network, "layers") else {}
    if not hasattr(layers.get("mixed_6"), "conv"):
        return None

    def in_layers(images: Tensor) -> Outputs:
        x = (resize_299(images.float()) - 128) / 128
        spatial = x
        for name, layer in layers.items():
            if name == "mixed_6":
                spatial = layer.conv(x)[:, :7].movedim(1, 3).flatten(1)
            x = layer(x)
        return {"features": x.flatten(1), "spatial": spatial}

    generator = torch.Generator().manual_seed(0)
    probe = torch.randint(256, (2, 3, 64, 64), generator=generator, dtype=torch.uint8).to(device)
    with torch.inference_mode():
        own, ours = call(probe)["features"], in_layers(probe)["features"]
    same = own.shape == ours.shape and torch.allclose(own, ours, rtol=1e-3, atol=1e-4 * float(own.abs().max()))
    return in_layers if same else None


def resize_299(images: Tensor) -> Tensor:
    """Resize float (B, 3, H, W) to (B, 3, 299, 299): bilinear without antialiasing, corners as in TensorFlow 1 (pixel i
    of the result is pixel i H/299 of the image), as inside NVlabs's file."""
    height, width = images.shape[-2:]
    theta = torch.eye(2, 3, device=images.device)
    theta[0, 2] = 1 / width - 1 / 299
    theta[1, 2] = 1 / height - 1 / 299
    grid = affine_grid(theta.expand(len(images), 2, 3), [len(images), 3, 299, 299], align_corners=False)
    return grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _dinov2(encoder: "Encoder") -> Callable[[Tensor], Outputs]:
    """Return a function from images to the class token after the last norm, not normalised. The whole image is resized
    to 224 pixels by an antialiased bicubic filter: as in EDM2's FD-DINOv2, after Stein et al. (arXiv 2306.04675)."""
    kind = encoder.network.config.model_type
    if not kind.startswith("dinov2"):
        raise ValueError(f"a model of type {kind}, not dinov2")
    size = encoder.transform["crop_size"]
    mean, std = (
        torch.tensor(encoder.transform[name], device=encoder.device)[:, None, None]
        for name in ("image_mean", "image_std")
    )

    def call(images: Tensor) -> Outputs:
        x = interpolate(images.float(), (size["height"], size["width"]), mode="bicubic", antialias=True)
        return {"features": encoder.network(pixel_values=(x / 255 - mean) / std).pooler_output}

    return call
