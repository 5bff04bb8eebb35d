"""The autoencoder between pixels and latents: diffusers' AutoencoderKL, from a local folder or a hub name."""

from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor


class VAE:
    """Images (B, 3, H, W) in [-1, 1] <-> moments (B, 2C, h, w) and latents (B, C, h, w).

    Raise ValueError if weights are missing: diffusers would initialise them at random.
    """

    def __init__(self, name: str, device: torch.device, precision: str = "fp32") -> None:
        self.name, self.device, self.precision = name, device, precision
        both: Any = AutoencoderKL.from_pretrained(name, low_cpu_mem_usage=False, output_loading_info=True)
        network, loaded = both
        if loaded["missing_keys"]:
            raise ValueError(f"no weights for {', '.join(sorted(loaded['missing_keys']))}")
        self.network = network.to(device).eval().requires_grad_(False)
        config = self.network.config
        self.channels: int = config.latent_channels
        self.factor: int = 2 ** (len(config.block_out_channels) - 1)  # image pixels per latent pixel, along a side
        self.scaling: float = config.scaling_factor
        self.shift: float = config.shift_factor or 0.0

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    @torch.inference_mode()
    def moments(self, images: Tensor) -> Tensor:
        """Return the mean and log-variance of each image's posterior, stacked along the channels; fp32, unscaled."""
        images = images.contiguous(memory_format=torch.channels_last)  # a fifth faster, even on CPUs
        with self._autocast():
            posterior = self.network.encode(images).latent_dist
        return torch.cat([posterior.mean.float(), posterior.logvar.float()], dim=1)

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Return the images of latents as networks are trained on them, (z - shift) * scaling."""
        with self._autocast():
            return self.network.decode(latents / self.scaling + self.shift).sample.float()
