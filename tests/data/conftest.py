"""Small random data sets."""

import numpy as np
import pytest

from data.neighbors.exact import nearest_neighbors
from data.sets.arrays import ArrayImages


@pytest.fixture(scope="session")
def random_images():
    """`number` images of 2 x 3 x 3, classes of very uneven size, features of a kind:

    scattered: nothing alike; clustered: tight clusters; tied: few different rows of whole numbers, so most similarities
    are equal to others.
    """

    def make(kind, number, classes, seed):
        rng = np.random.default_rng([seed, 77])
        features = {
            "scattered": lambda: rng.normal(size=(number, 8)),
            "clustered": lambda: (
                3 * rng.normal(size=(6, 8))[rng.integers(6, size=number)] + rng.normal(size=(number, 8))
            ),
            "tied": lambda: rng.integers(1, 4, size=(10, 4))[rng.integers(10, size=number)].astype(np.float64),
        }[kind]()
        weight = 0.5 ** np.arange(classes)
        label = rng.choice(classes, size=number, p=weight / weight.sum())
        x = rng.uniform(-1, 1, size=(number, 2, 3, 3)).astype(np.float32)
        return ArrayImages(x, label.astype(np.int64), features, classes)

    return make


@pytest.fixture(scope="session")
def graph_of(random_images):
    """A random data set and the neighbour graph of it."""

    def make(kind, number, neighbors, seed):
        images = random_images(kind, number, 5, seed)
        return images, nearest_neighbors(images.features, min(neighbors, number - 1))

    return make
