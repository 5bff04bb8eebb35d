"""A checksum of a network's weights."""

import hashlib

import torch
from torch import nn


def fingerprint(network: nn.Module) -> str:
    """Return the SHA-256 of names, types, shapes and values: the same for all copies of a network, whatever their
    files."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
