"""The VAE against diffusers' own parts, called one by one, and its fingerprint."""

import shutil
from collections import OrderedDict

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import nn

from models.pretrained.fingerprint import fingerprint
from models.pretrained.vae import VAE

CPU = torch.device("cpu")
WEIGHTS = "diffusion_pytorch_model.safetensors"


def images(seed, number=3, side=64):
    return 2 * torch.rand(number, 3, side, side, generator=torch.Generator().manual_seed(seed)) - 1


@pytest.mark.parametrize("seed", range(3))
def test_moments_are_what_encoder_and_quant_conv_give_with_the_log_variance_clamped(save_vae, seed):
    folder = save_vae(seed)
    network, x = AutoencoderKL.from_pretrained(folder).eval(), images(seed)
    network.quant_conv.bias.data[4:6] = torch.tensor([-100.0, 100.0])
    network.save_pretrained(folder)
    with torch.no_grad():
        mean, logvar = network.quant_conv(network.encoder(x)).chunk(2, dim=1)
    moments = VAE(str(folder), CPU).moments(x)
    assert moments.shape == (3, 8, 8, 8) and moments.dtype == torch.float32
    torch.testing.assert_close(moments[:, :4], mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(moments[:, 4:], logvar.clamp(-30, 20), rtol=1e-5, atol=1e-5)
    assert (moments[:, 4] == -30).any() and (moments[:, 5] == 20).any()
    assert moments[:, :4].std(dim=0).mean() > 0.01, "they depend on the image"


def test_moments_of_an_image_do_not_depend_on_the_others_of_its_batch_nor_on_the_call(save_vae):
    vae, x = VAE(str(save_vae()), CPU), images(1, number=5)
    together = vae.moments(x)
    assert torch.equal(together, vae.moments(x)), "nothing is drawn"
    for i in range(5):
        torch.testing.assert_close(vae.moments(x[i : i + 1])[0], together[i], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(2))
def test_bf16_runs_on_the_cpu_gives_fp32_numbers_and_comes_near_to_it(save_vae, seed):
    folder, x = save_vae(seed), images(seed)
    exact, rounded = VAE(str(folder), CPU).moments(x), VAE(str(folder), CPU, "bf16").moments(x)
    assert rounded.dtype == torch.float32
    error = (rounded - exact).abs().mean() / exact.abs().mean()
    assert 1e-5 < error < 0.05


@pytest.mark.parametrize(("scaling", "shift"), [(0.18215, None), (0.5, 0.25), (1.5305, -0.0609)])
def test_decoding_undoes_scaling_and_shift_as_training_applies_them(save_vae, scaling, shift):
    folder = save_vae(scaling_factor=scaling, shift_factor=shift)
    vae, network = VAE(str(folder), CPU), AutoencoderKL.from_pretrained(folder)
    assert vae.scaling == scaling and vae.shift == (shift or 0)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = network.decode(latents).sample
    decoded = vae.decode((latents - vae.shift) * vae.scaling)
    assert decoded.shape == (2, 3, 64, 64)
    torch.testing.assert_close(decoded, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("widths", "channels"), [((8, 8, 8, 8), 4), ((8, 16, 8), 3), ((8, 8), 16)])
def test_channels_and_factor_are_those_of_the_network(save_vae, widths, channels):
    vae = VAE(str(save_vae(widths=widths, latent_channels=channels)), CPU)
    side = 64 // vae.factor
    assert vae.channels == channels
    assert vae.moments(images(0, number=1)).shape == (1, 2 * channels, side, side)


def test_it_is_frozen_and_neither_drawing_nor_training(save_vae):
    vae = VAE(str(save_vae()), CPU)
    assert not any(module.training for module in vae.network.modules())
    assert not any(parameter.requires_grad for parameter in vae.network.parameters())
    assert not vae.moments(images(0, 1)).requires_grad


def test_weights_kept_in_half_precision_are_computed_with_in_fp32(save_vae, tmp_path):
    folder = shutil.copytree(save_vae(), tmp_path / "half")
    rounded = {name: tensor.half() for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(rounded, folder / WEIGHTS)
    vae = VAE(str(folder), CPU)
    assert {parameter.dtype for parameter in vae.network.parameters()} == {torch.float32}
    network = AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32)
    network.load_state_dict({name: tensor.float() for name, tensor in rounded.items()})
    with torch.no_grad():
        expected = network.encode(images(0)).latent_dist.mean
    torch.testing.assert_close(vae.moments(images(0))[:, :4], expected, rtol=1e-4, atol=1e-5)


def test_a_vae_that_lacks_a_weight_is_refused_rather_than_completed_at_random(save_vae, tmp_path):
    folder = shutil.copytree(save_vae(), tmp_path / "lacking")
    weights = load_file(folder / WEIGHTS)
    del weights["encoder.conv_in.weight"]
    save_file(weights, folder / WEIGHTS)
    with pytest.raises((OSError, ValueError), match=r"encoder\.conv_in\.weight"):
        VAE(str(folder), CPU)


def test_copies_of_a_network_have_one_fingerprint_whatever_their_files_are(save_vae, tmp_path):
    folder = save_vae()
    network = AutoencoderKL.from_pretrained(folder)
    network.save_pretrained(tmp_path / "bin", safe_serialization=False)
    shutil.copytree(folder, tmp_path / "copy")
    prints = {fingerprint(VAE(str(path), CPU).network) for path in (folder, tmp_path / "bin", tmp_path / "copy")}
    assert len(prints) == 1 and fingerprint(network) in prints
    assert fingerprint(AutoencoderKL.from_pretrained(save_vae(1))) not in prints


class Holder(nn.Module):
    """Nothing but these tensors."""

    def __init__(self, **tensors):
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)


def test_a_fingerprint_tells_names_shapes_types_and_every_bit_and_not_the_order():
    x, y = torch.arange(6.0), torch.tensor(2.5)
    changed = x.clone()
    changed.view(torch.int32)[3] ^= 1
    networks = {
        "original": Holder(a=x, b=y),
        "renamed": Holder(a=x, c=y),
        "exchanged": Holder(b=x, a=y),
        "reshaped": Holder(a=x.view(2, 3), b=y),
        "retyped": Holder(a=x.view(torch.int32), b=y),
        "one bit": Holder(a=changed, b=y),
        "minus zero": Holder(a=torch.cat([-x[:1], x[1:]]), b=y),
        "more": Holder(a=x, b=y, c=torch.empty(0)),
        "none": Holder(),
    }
    prints = {name: fingerprint(network) for name, network in networks.items()}
    assert len(set(prints.values())) == len(prints)
    same = [Holder(b=y, a=x), Holder(a=torch.stack([x, x], dim=1)[:, 0], b=y.clone())]
    assert {fingerprint(network) for network in same} == {prints["original"]}


def test_a_fingerprint_is_the_same_for_tensors_that_share_memory_or_are_of_any_type():
    ordered = OrderedDict(a=nn.Linear(3, 3), b=nn.BatchNorm1d(3))
    network = nn.Sequential(ordered).bfloat16()
    assert fingerprint(network) == fingerprint(network) != fingerprint(network.float())
    flags = Holder(mask=torch.tensor([True, False]), number=torch.tensor(3))
    assert fingerprint(flags) != fingerprint(Holder(mask=torch.tensor([True, True]), number=torch.tensor(3)))
