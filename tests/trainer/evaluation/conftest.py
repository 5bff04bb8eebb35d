"""Detectors and images."""

import pytest

from tests.trainer import detectors
from tests.trainer.detectors import Inception, Plain, WithSpatial, save_images
from trainer.ranks import process_group


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """Detectors and images, to be read only."""
    folder = tmp_path_factory.mktemp("evaluate")
    for name, module in {"plain": Plain(6), "spatial": WithSpatial(), "inception": Inception()}.items():
        detectors.save(module, folder / f"{name}.pt")
    save_images(folder / "made.npz", 300, seed=1)
    save_images(folder / "real.npz", 230, seed=2)
    return folder


@pytest.fixture(scope="module")
def world():
    with process_group() as ranks:
        yield ranks
