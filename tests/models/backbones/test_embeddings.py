import copy

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from models.backbones.dit import unpatchify
from models.backbones.embeddings import (
    NULL_LABEL,
    LabelEmbedder,
    PatchEmbedder,
    SampleEmbedder,
    TimestepEmbedder,
    sincos_positions,
)


def mae_positions(width, side):
    """Position embedding as MAE and DiT define it, entry by entry: half the width for the column, then half for the
    row; of each half, sines, then cosines, of position / 10000^(i / (width / 4))."""
    table = np.empty((side * side, width))
    quarter = width // 4
    for row in range(side):
        for column in range(side):
            for i in range(quarter):
                rate = 1 / 10000 ** (i / quarter)
                table[row * side + column, i] = np.sin(column * rate)
                table[row * side + column, quarter + i] = np.cos(column * rate)
                table[row * side + column, 2 * quarter + i] = np.sin(row * rate)
                table[row * side + column, 3 * quarter + i] = np.cos(row * rate)
    return table


@pytest.mark.parametrize(("width", "side"), [(4, 1), (8, 3), (96, 4), (1152, 16)])
def test_positions_are_those_of_mae_and_dit(width, side):
    positions = sincos_positions(width, side)
    assert positions.dtype == torch.float32
    np.testing.assert_allclose(positions.numpy(), mae_positions(width, side), rtol=0, atol=1e-7)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("patch", [1, 2, 4])
def test_patch_embedding_is_a_strided_convolution(random_weights, seed, patch):
    embed = random_weights(PatchEmbedder(patch, 3, 20), seed)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    kernel = embed.proj.weight.view(20, 3, patch, patch)
    expected = F.conv2d(x, kernel, embed.proj.bias, stride=patch).flatten(2).transpose(1, 2)
    torch.testing.assert_close(embed(x), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_unpatchify_puts_each_patch_where_it_was(patch):
    x = torch.randn(2, 3, 8, 8)
    corners = [(row, column) for row in range(0, 8, patch) for column in range(0, 8, patch)]
    cut = [x[:, :, r : r + patch, c : c + patch].permute(0, 2, 3, 1).flatten(1) for r, c in corners]  # p, q, channel
    assert torch.equal(unpatchify(torch.stack(cut, dim=1), patch), x)


@pytest.mark.parametrize("seed", range(3))
def test_time_embedding_is_cosines_then_sines_through_two_layers(random_weights, seed):
    embed = random_weights(TimestepEmbedder(16), seed)
    t = 1000 * torch.rand(50, generator=torch.Generator().manual_seed(seed))
    rates = 10000.0 ** -(np.arange(128) / 128)
    angles = t.double().numpy()[:, None] * rates
    waves = torch.from_numpy(np.concatenate([np.cos(angles), np.sin(angles)], axis=1))
    first, _, second = copy.deepcopy(embed.mlp).double()
    expected = second(F.silu(first(waves)))
    torch.testing.assert_close(embed(t).double(), expected, rtol=0, atol=1e-3)  # angles to 1000 in fp32


def test_a_time_embedding_is_the_same_under_autocast(random_weights):
    embed, t = random_weights(TimestepEmbedder(32), 0), torch.arange(1000.0)
    with torch.autocast("cpu", torch.bfloat16):
        out = embed(t)
    assert torch.equal(out, embed(t)) and len(out.unique(dim=0)) == 1000


@pytest.mark.parametrize("classes", [1, 10, 1000])
def test_the_null_label_takes_the_last_row_and_classes_their_own(classes):
    embed = LabelEmbedder(classes, 4)
    table = embed.embedding_table.weight
    assert table.shape == (classes + 1, 4)
    label = torch.tensor([NULL_LABEL, 0, classes - 1, NULL_LABEL])
    assert torch.equal(embed(label), table[[classes, 0, classes - 1, classes]])
    assert label.tolist() == [NULL_LABEL, 0, classes - 1, NULL_LABEL]  # the caller's labels are not written to


def test_a_slot_is_a_row_of_the_sample_embedding():
    embed = SampleEmbedder(16, 4)
    slot = torch.randperm(16)
    assert torch.equal(embed(slot), embed.embedding_table.weight[slot])
