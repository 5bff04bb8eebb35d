"""Latents as training sees them: drawn from the posteriors in a store, which lies in memory-mapped shards."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.randomness import Draws
from data.sets.stored import StoredImages, check_expected
from data.stores.store import read_manifest

MADE_BY = "tools/precompute_latents.py"


class LatentFormat:
    """What a store of latents holds. DataError where `expected` (channels, side, scaling; None: any) is not so."""

    def __init__(self, folder: str, expected: dict[str, float | None]) -> None:
        self.manifest = read_manifest(Path(folder), "latents", MADE_BY)
        _, channels, height, width = self.manifest["fields"]["moments"]["shape"]
        self.shape = (channels // 2, height, width)
        self.num_classes: int = self.manifest["num_classes"]
        settings = self.manifest["settings"]
        self.scaling, self.shift = settings["scaling_factor"], settings["shift_factor"]
        self.vae: str = settings["name"]
        self.identity = f"keys {self.manifest['keys'][:12]}, VAE {str(settings.get('vae_weights'))[:12]}"
        found = {"channels": self.shape[0], "side": width, "scaling": self.scaling}
        check_expected("latents", folder, expected, found)

    def drawn(self, moments: np.ndarray, noise: np.ndarray) -> Tensor:
        """Samples (b, C, h, w) of posteriors of moments (b, 2C, h, w): (mean + std * noise - shift) * scaling."""
        mean, logvar = torch.from_numpy(moments).float().chunk(2, dim=1)
        return (0.5 * logvar).exp_().mul_(torch.from_numpy(noise)).add_(mean).sub_(self.shift).mul_(self.scaling)


class Latents(StoredImages):
    """The images of a store by number; see data.sets.registry.Images."""

    posterior = True

    def __init__(
        self, folder: str, neighbors: str | None, vae: str | None, flip: bool, expected: dict[str, float | None]
    ) -> None:
        self._format, self._flip = LatentFormat(folder, expected), flip
        super().__init__(folder, self._format.manifest, neighbors)
        self.shape, self.vae, self.identity = self._format.shape, vae or self._format.vae, self._format.identity

    def read(self, numbers: np.ndarray, draws: Draws) -> Tensor:
        """One sample of each image's posterior, or of its mirror image's."""
        entry = draws.flip if self._flip else np.zeros(len(numbers), bool)
        return self._format.drawn(self._store.read("moments", numbers, entry), draws.posterior)
