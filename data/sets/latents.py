"""Latents as training sees them: drawn from the posteriors in a store of memory-mapped shards."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.randomness import Draws
from data.sets.stored import StoredImages, check_expected
from data.stores.store import read_manifest

MADE_BY = "tools/precompute_latents.py"
MAIN = "moments"  # the field that holds the images


class LatentFormat:
    """The contents of a store of latents. Raise DataError if they differ from `expected`: channels, side, scaling;
    None: any."""

    def __init__(self, folder: str, expected: dict[str, float | None]) -> None:
        self.manifest = read_manifest(Path(folder), "latents", MADE_BY)
        _, channels, height, width = self.manifest["fields"][MAIN]["shape"]
        self.shape = (channels // 2, height, width)
        self.num_classes: int = self.manifest["num_classes"]
        settings = self.manifest["settings"]
        self.scaling, self.shift = settings["scaling_factor"], settings["shift_factor"]
        self.vae: str = settings["name"]
        self.identity = f"keys {self.manifest['keys'][:12]}, VAE {str(settings.get('vae_weights'))[:12]}"
        found = {"channels": self.shape[0], "side": width, "scaling": self.scaling}
        check_expected("latents", folder, expected, found)

    def drawn(self, moments: np.ndarray, draws: Draws) -> Tensor:
        """Return (mean + std * noise - shift) * scaling, (b, C, h, w), for posteriors with moments (b, 2C, h, w)."""
        assert draws.posterior is not None, "latents are drawn from a posterior"
        mean, logvar = torch.from_numpy(moments).float().chunk(2, dim=1)
        noise = torch.from_numpy(draws.posterior)
        return (0.5 * logvar).exp_().mul_(noise).add_(mean).sub_(self.shift).mul_(self.scaling)


class Latents(StoredImages):
    """The latents of a store, by number."""

    posterior = True

    def __init__(
        self, folder: str, neighbors: str | None, vae: str | None, flip: bool, expected: dict[str, float | None]
    ) -> None:
        self._format = LatentFormat(folder, expected)
        super().__init__(folder, self._format.manifest, MAIN, neighbors, flip)
        self.shape, self.vae, self.identity = self._format.shape, vae or self._format.vae, self._format.identity

    def read(self, numbers: np.ndarray, draws: Draws) -> Tensor:
        """Return one sample of each image's posterior, or of its mirror image's."""
        moments = self._store.read(MAIN, numbers, self.flipped(numbers, draws))
        return self._format.drawn(moments, draws)
