"""Scikit-learn's handwritten digits: 1,797 real 8x8 images of 10 classes that ship with the package."""

import numpy as np


def load(split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Return (x (n, 1, 8, 8) in [-1, 1], label (n,), features (n, 64): the pixels 0..16, number of classes).

    Every third image is held out, so that both splits contain every writer and every class.
    """
    import sklearn.datasets  # slow: as long to import as all else except torch, and only digits need it

    pixels, label = sklearn.datasets.load_digits(return_X_y=True)
    chosen = (np.arange(len(label)) % 3 == 2) == (split == "heldout")
    pixels, label = pixels[chosen], label[chosen].astype(np.int64)
    x = (pixels / 8 - 1).astype(np.float32).reshape(-1, 1, 8, 8)
    return x, label, pixels, 10
