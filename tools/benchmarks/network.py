"""What benchmarks of the network share: the network, and the end of what the GPU does."""

import torch

from models.backbones.dit import DiT


def dit(size: str) -> DiT:
    """Return a DiT with patches of 2 for latents of 4 x 32 x 32 and 1000 classes, on the GPU if there is one."""
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return DiT(DiT.Config.model_validate({"size": size}), channels=4, side=32, num_classes=1000)


def wait() -> None:
    """Wait until the GPU, if there is one, has done what it was asked for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
