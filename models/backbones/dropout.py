"""Dropout (Srivastava et al. 2014) as a pure function. What is dropped follows from a hash of the image, the layer and
the position of a number in it, not from a stream of random numbers: an image has the same masks on any rank, in any
batch and precision, when its block is computed again for the backward pass, and when a run continues.

Numbers are words of 32 bits in int64, where their products do not overflow.
"""

import torch
from torch import Tensor

WORD = 2**32 - 1
SEEDS = 64  # numbers of the noise that tell an image apart: 64 floats of 24 random bits


def image_keys(noise: Tensor) -> Tensor:
    """Return two words (B, 2) for each image of a training step, given its noise (B, ...), which no other image, and no
    other step, has."""
    bits = noise.flatten(1)[:, :SEEDS].float().contiguous().view(torch.int32).to(torch.int64) & WORD
    place = torch.arange(bits.shape[1], device=noise.device)
    words = [_scramble(_scramble(bits ^ which) ^ place).sum(dim=1) & WORD for which in (1, 2)]
    return torch.stack(words, dim=1)


def layer_keys(keys: Tensor, layers: int) -> tuple[Tensor, ...]:
    """Return the keys (B, 2) for each of a number of layers, given those of their images."""
    numbers = torch.arange(layers, device=keys.device)[:, None, None]
    return _scramble(_scramble(keys) ^ numbers).unbind()


def dropped(x: Tensor, rate: float, keys: Tensor) -> Tensor:
    """Return x (B, L, width) with a share `rate` of its numbers set to 0 and the others divided by 1 - rate, given the
    layer's keys of its images."""
    _, tokens, width = x.shape
    place = torch.arange(tokens * width, device=x.device)
    first, second = keys[:, :1], keys[:, 1:]
    word = _scramble(_scramble(place ^ first) ^ second)
    drop = (word < round(rate * 2**32)).view(x.shape)
    return x.masked_fill(drop, 0) * (1 / (1 - rate))


def _scramble(word: Tensor) -> Tensor:
    """Return a permutation of the words 0 to 2^32 - 1 in which each bit depends on all (Wellons 2018, "Prospecting for
    Hash Functions": 16 21f0aaad 15 d35a2d97 15)."""
    word = (word ^ (word >> 16)) * 0x21F0AAAD & WORD
    word = (word ^ (word >> 15)) * (0xD35A2D97 - 2**32) & WORD  # negative: the same word, and no overflow
    return word ^ (word >> 15)
