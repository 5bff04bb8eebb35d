"""What weights start as."""

import math

import pytest


def assert_xavier_uniform(layers):
    """Glorot and Bengio's uniform distribution, by its bound and its standard deviation."""
    for layer in layers:
        fan_out, fan_in = layer.weight.shape
        bound = math.sqrt(6 / (fan_in + fan_out))
        assert 0.98 * bound < layer.weight.abs().max() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
