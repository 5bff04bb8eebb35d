"""The velocity field of groups, by finite differences in float64."""

import pytest
import torch

from models.paths.registry import make_path, path_config
from models.sampling.field import velocity_field
from models.sampling.guidance import Guidance, Networks, guided
from models.sampling.verifier import sum_of_groups

LABEL, SLOT = torch.tensor([3, 3, 3, 3]), torch.tensor([5, 2, 7, 0])


def field_of(random_dit, guidance, path="linear"):
    return velocity_field(Networks(random_dit(0).double()), make_path(path_config(path)), guidance, LABEL, SLOT)


def images(seed):
    return torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("guidance", [Guidance(1.0, 2), Guidance(2.5, 1, 4), Guidance(1.7, 4, 4, channels=2)])
def test_vjp_and_jvp_are_those_of_finite_differences(random_dit, guidance):
    field, x, direction, weight, h = field_of(random_dit, guidance), images(0), images(1), images(2), 1e-5
    slope = (field(x + h * direction, 0.4) - field(x - h * direction, 0.4)) / (2 * h)
    _, by_jvp = torch.func.jvp(lambda x: field(x, 0.4), (x,), (direction,))
    torch.testing.assert_close(by_jvp, slope, rtol=1e-5, atol=1e-7)
    _, pull = torch.func.vjp(lambda x: field(x, 0.4), x)
    torch.testing.assert_close((pull(weight)[0] * direction).sum(), (weight * slope).sum(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_images_feel_those_of_their_group_and_no_others(random_dit, size):
    field, x = field_of(random_dit, Guidance(2.0, size, size)), images(0).requires_grad_()
    for image in range(4):
        (felt,) = torch.autograd.grad(field(x, 0.4)[image].square().sum(), x)
        together = torch.arange(4) // size == image // size
        assert (felt[together].flatten(1).abs().amax(dim=1) > 0).all() and not felt[~together].any()


def test_it_is_what_samplers_follow_and_ddpm_has_none(random_dit):
    guidance, path = Guidance(2.0, 1, 4), make_path(path_config("gvp"))
    x, networks = images(0), Networks(random_dit(0).double())
    expected = guided(networks, path, guidance, LABEL, lambda prediction: SLOT)(x, 0.4)
    torch.testing.assert_close(velocity_field(networks, path, guidance, LABEL, SLOT)(x, 0.4), expected)
    with pytest.raises(ValueError, match="path=ddpm: has no velocity"):
        field_of(random_dit, guidance, "ddpm")


def test_what_is_told_of_images_is_summed_over_their_group():
    assert sum_of_groups(torch.arange(6.0), 3).tolist() == [3, 12]
    with pytest.raises(ValueError, match="group_size=4: must divide the number of images, 6"):
        sum_of_groups(torch.arange(6.0), 4)
