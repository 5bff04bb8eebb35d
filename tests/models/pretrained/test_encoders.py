"""Image encoders against transformers' own parts."""

import shutil

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModel

from models.pretrained.encoders import Encoder, interpolated_positions

CPU = torch.device("cpu")


def pictures(seed, number=4):
    rng = np.random.default_rng(seed)
    shapes = rng.integers(20, 70, size=(number, 2))
    return [Image.fromarray(rng.integers(256, size=(*shape, 3), dtype=np.uint8)) for shape in shapes]


def prepared(encoder, images):
    return torch.from_numpy(np.stack([encoder.prepare(image) for image in images]))


def unit(vectors):
    return vectors / vectors.norm(dim=1, keepdim=True)


def expected_features(kind, folder, x):
    network = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    if kind == "dinov2":
        return network.layernorm(network.encoder(network.embeddings(x)).last_hidden_state)[:, 0]
    if kind == "clip":
        return network.visual_projection(network.vision_model(x).pooler_output)
    if kind == "siglip":
        return network.vision_model(x).pooler_output
    if kind == "resnet":
        return network(x).last_hidden_state.mean(dim=(2, 3))
    if kind == "ijepa":
        return network(x).last_hidden_state.mean(dim=1)
    return network(x).pooler_output


KINDS = {"dinov2": 32, "clip": 12, "siglip": 32, "siglip_vision": 32, "vit": 32, "ijepa": 32, "resnet": 16}


@pytest.mark.parametrize(("kind", "width"), KINDS.items())
def test_features_are_unit_vectors_of_the_image_tower(save_encoder, kind, width):
    folder = save_encoder(kind)
    encoder = Encoder(str(folder), CPU)
    images = pictures(0)
    x = prepared(encoder, images)
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    torch.testing.assert_close(x, processor(images, return_tensors="pt")["pixel_values"])
    with torch.no_grad():
        expected = unit(expected_features(kind, folder, x))
    features = encoder.features(x)
    assert features.shape == (4, width) and features.dtype == torch.float32, "one vector per image"
    torch.testing.assert_close(features.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    similarity = features @ features.T
    assert similarity[~torch.eye(4, dtype=bool)].max() < 1 - 1e-5, "images differ"
    torch.testing.assert_close(encoder.features(x[2:3])[0], features[2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["dinov2", "clip", "siglip"])
@pytest.mark.parametrize("side", [(1, 40), (40, 1), (3, 50), (50, 3), (3, 3), (1, 1), (200, 30)])
def test_images_of_odd_shapes_are_prepared_with_their_colours_last(save_encoder, kind, side):
    """Three pixels high or wide, an array could be taken for one with the colours first."""
    encoder = Encoder(str(save_encoder(kind)), CPU)
    height, width = side
    colour = np.array([250, 120, 10], dtype=np.uint8)
    x = encoder.prepare(Image.fromarray(np.broadcast_to(colour, (height, width, 3)).copy()))
    assert x.shape == (3, 28, 28) and x.dtype == np.float32
    assert np.ptp(x, axis=(1, 2)).max() < 1e-5, "one colour stays one"
    again = encoder.prepare(Image.fromarray(np.broadcast_to(colour, (31, 37, 3)).copy()))
    np.testing.assert_allclose(x, again, atol=1e-5)


@pytest.mark.parametrize("kind", ["dinov2", "clip", "siglip"])
def test_bf16_runs_on_the_cpu_and_comes_near_to_fp32(save_encoder, kind):
    folder = str(save_encoder(kind))
    exact, rounded = Encoder(folder, CPU), Encoder(folder, CPU, "bf16")
    x = prepared(exact, pictures(1))
    difference = (exact.features(x) - rounded.features(x)).norm(dim=1)
    assert rounded.features(x).dtype == torch.float32
    assert 1e-6 < difference.max() < 0.05


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["dinov2", "clip"])
def test_weights_kept_in_half_precision_are_computed_with_in_the_precision_asked_for(
    save_encoder, tmp_path, kind, stored, precision
):
    folder = shutil.copytree(save_encoder(kind), tmp_path / "half")
    AutoModel.from_pretrained(folder, dtype=stored).save_pretrained(folder)
    encoder = Encoder(str(folder), CPU, precision)
    x = prepared(encoder, pictures(2))
    with torch.no_grad():
        expected = unit(expected_features(kind, folder, x))
    tolerance = 1e-5 if precision == "fp32" else 0.05
    torch.testing.assert_close(encoder.features(x), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", ["dinov2", "clip", "vit"])
def test_an_encoder_that_lacks_weights_is_refused_rather_than_completed_at_random(save_encoder, tmp_path, kind):
    """As ViT classifiers lack the pooler: each process would have another one."""
    folder = shutil.copytree(save_encoder(kind), tmp_path / "lacking")
    weights = load_file(folder / "model.safetensors")
    lacking = {"dinov2": "layernorm.weight", "clip": "visual_projection.weight", "vit": "pooler.dense.weight"}[kind]
    del weights[lacking]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((OSError, ValueError), match=lacking):
        Encoder(str(folder), CPU)


def test_it_is_frozen_and_not_training(save_encoder):
    encoder = Encoder(str(save_encoder("dinov2")), CPU)
    assert not any(module.training for module in encoder.network.modules())
    assert not any(parameter.requires_grad for parameter in encoder.network.parameters())
    assert isinstance(encoder.network, transformers.Dinov2Model)


def bicubic(grid, patches):
    """Pixel i of the result is at (i + 1/2) m / (n + 0.1) - 1/2 of the grid (m, m, d); weights of Keys' kernel with
    a = -3/4, and beyond the border its nearest values: what DINOv2's interpolate_pos_encoding does, one by one."""
    m = len(grid)

    def kernel(x):
        x, a = abs(x), -0.75
        return (a + 2) * x**3 - (a + 3) * x**2 + 1 if x <= 1 else a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0

    weights = np.zeros((patches, m))
    for i in range(patches):
        place = (i + 0.5) * m / (patches + 0.1) - 0.5
        for j in range(int(np.floor(place)) - 1, int(np.floor(place)) + 3):
            weights[i, min(max(j, 0), m - 1)] += kernel(place - j)
    return np.einsum("im,jn,mnd->ijd", weights, weights, grid)


@pytest.mark.parametrize(("side", "patches"), [(37, 16), (5, 3), (4, 9), (7, 7)])
def test_the_position_embedding_of_dinov2_is_interpolated_as_the_original_model_does(side, patches):
    known = torch.randn(1, 1 + side**2, 6, generator=torch.Generator().manual_seed(0))
    found = interpolated_positions(known, patches)
    assert found.shape == (1, 1 + patches**2, 6) and torch.equal(found[:, 0], known[:, 0])
    expected = known[0, 1:].unflatten(0, (side, side)).double().numpy()
    expected = expected if side == patches else bicubic(expected, patches)
    np.testing.assert_allclose(found[0, 1:].unflatten(0, (patches, patches)).numpy(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["Dinov2", "Dinov2WithRegisters"])
def test_dinov2_sees_images_of_another_size_with_the_positions_of_the_original_model(tmp_path, kind):
    """Once, at load; with registers, whose original is antialiased and to the size, it is what transformers does."""
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 70, "patch_size": 14}
    network = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**size)).eval()
    for weight in network.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    torch.nn.init.normal_(network.embeddings.position_embeddings, std=9)
    network.save_pretrained(tmp_path)
    crop = {"height": 42, "width": 42}
    transformers.BitImageProcessor(size={"shortest_edge": 48}, crop_size=crop).save_pretrained(tmp_path)
    encoder = Encoder(str(tmp_path), CPU)
    x = prepared(encoder, pictures(3))
    assert x.shape[2:] == (42, 42)
    with torch.no_grad():
        theirs = unit(network(x).pooler_output)
        if kind == "Dinov2":
            known = network.embeddings.position_embeddings
            grid = torch.from_numpy(bicubic(known[0, 1:].unflatten(0, (5, 5)).double().numpy(), 3)).float()
            network.embeddings.position_embeddings = torch.nn.Parameter(
                torch.cat([known[:, :1], grid.flatten(0, 1)[None]], dim=1)
            )
        expected = unit(network(x).pooler_output)
    torch.testing.assert_close(encoder.features(x), expected, rtol=1e-4, atol=1e-5)
    assert ((expected - theirs).abs().max() > 1e-3) == (kind == "Dinov2"), "transformers' own differs"
