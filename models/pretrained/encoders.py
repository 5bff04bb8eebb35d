"""Pretrained image encoders (DINOv2, CLIP, SigLIP and the like), from transformers, for comparing images."""

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, normalize
from transformers import AutoImageProcessor, AutoModel


class Encoder:
    """An image tower from a local folder or a hub name, with its image processor.

    Raise ValueError if weights are missing: transformers would initialise them at random.
    """

    def __init__(self, name: str, device: torch.device, precision: str = "fp32") -> None:
        self.device, self.precision = device, precision
        network, loaded = AutoModel.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
        if loaded["missing_keys"]:
            raise ValueError(f"no weights for {', '.join(sorted(loaded['missing_keys']))}")
        self._processor = AutoImageProcessor.from_pretrained(name, backend="pil")
        self.transform: dict = self._processor.to_dict()
        size = self.transform.get("crop_size")
        if network.config.model_type == "dinov2" and size and size["height"] == size["width"]:
            positions = interpolated_positions(
                network.embeddings.position_embeddings.data, size["height"] // network.config.patch_size
            )
            network.embeddings.position_embeddings = torch.nn.Parameter(positions)
        self.network = network.to(device).eval().requires_grad_(False)

    def prepare(self, image: Image.Image) -> np.ndarray:
        """Return an RGB image as the network's input (3, H, W) float32, with its resizing, cropping and
        normalisation."""
        return self._processor(image, return_tensors="np")["pixel_values"][0]

    @torch.inference_mode()
    def features(self, inputs: Tensor) -> Tensor:
        """Return one unit vector per image, (B, d) fp32, from inputs (B, 3, H, W): the projected embedding of a model
        of images and text (CLIP, SigLIP), otherwise the pooled output of an image tower (DINOv2: its class token), or
        the mean of its patches (I-JEPA)."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            embed = getattr(self.network, "get_image_features", self.network)
            output = embed(pixel_values=inputs)
        pooled = output.pooler_output if output.pooler_output is not None else output.last_hidden_state.mean(dim=1)
        return normalize(pooled.float().flatten(1), dim=1)


def interpolated_positions(known: Tensor, patches: int) -> Tensor:
    """Return DINOv2's position embedding (1, 1 + m^2, d) for `patches` a side, (1, 1 + patches^2, d), as the original
    model does (Oquab et al., arXiv 2304.07193, its code): bicubic, without antialiasing, by (patches + 0.1) / m.

    For images of 224 pixels transformers would interpolate by 16 / 37, which moves features by 5 % of their spread;
    given an embedding of the right size, it takes it as it is. In float64, so that all machines have the same weights.
    """
    side = math.isqrt(known.shape[1] - 1)
    if patches == side:
        return known
    grid = known[:, 1:].unflatten(1, (side, side)).movedim(3, 1).double()
    fitted = interpolate(grid, scale_factor=(patches + 0.1) / side, mode="bicubic")
    return torch.cat([known[:, :1], fitted.flatten(2).mT.to(known)], dim=1)
