"""From the network's samples to pixels."""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from trainer.errors import NOT_LOADED, RunError, first_line

BATCH = 16  # images that the VAE decodes at once


@lru_cache(maxsize=1)
def make_decoder(vae: str | None, channels: int, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Return a function from samples (..., channels, H, W) to pixels in [-1, 1] on the CPU: decoded by this VAE, or as
    they are without one. Raise RunError if the VAE cannot be loaded, or its latents have another number of channels.
    """
    if vae is None:
        return lambda samples: samples
    from models.pretrained.vae import VAE  # diffusers is slow to import

    try:
        network = VAE(vae, device)
    except NOT_LOADED as error:
        raise RunError(
            f"data.vae={vae}: cannot be loaded to decode samples: {first_line(error)}; set it to a folder of the"
            " VAE, or (in training) train.sample_every=0"
        ) from None

    if network.channels != channels:
        raise RunError(
            f"data.vae={vae}: decodes {network.channels} channels, the latents have {channels}; set the right one"
        )

    def decode(samples: Tensor) -> Tensor:
        pixels = torch.cat([network.decode(some.to(device)).cpu() for some in samples.flatten(0, -4).split(BATCH)])
        return pixels.unflatten(0, samples.shape[:-3])

    return decode
