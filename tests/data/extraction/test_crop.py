"""Decoding and cropping against ADM's definition, written out anew."""

import io

import numpy as np
import pytest
from PIL import Image

from data.extraction.crop import center_crop, decode_rgb

SIZES = [(1, 1000), (1000, 1), (255, 256), (513, 400), (64, 64), (63, 65), (128, 128), (127, 300)]


def adm(image, size):
    """`center_crop_arr` of guided-diffusion."""
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.BOX)
    scale = size / min(*image.size)
    image = image.resize(tuple(round(x * scale) for x in image.size), resample=Image.BICUBIC)
    array = np.array(image)
    top, left = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[top : top + size, left : left + size]


def noise(width, height, channels, seed=0, dtype=np.uint8):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(np.iinfo(dtype).max, size=shape, dtype=dtype)


def encoded(image, file_format, **options):
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


@pytest.mark.parametrize("side", SIZES)
@pytest.mark.parametrize("size", [16, 64])
def test_the_crop_of_odd_sizes_is_adms(side, size):
    image = Image.fromarray(noise(*side, 3))
    cropped = center_crop(image, size)
    assert cropped.shape == (size, size, 3) and cropped.dtype == np.uint8
    np.testing.assert_array_equal(cropped, adm(image, size))


@pytest.mark.parametrize("seed", range(12))
def test_the_crop_of_random_sizes_is_adms(seed):
    rng = np.random.default_rng(seed)
    width, height, size = rng.integers(2, 400), rng.integers(2, 400), int(rng.integers(8, 90))
    image = Image.fromarray(noise(width, height, 3, seed))
    np.testing.assert_array_equal(center_crop(image, size), adm(image, size))


def pictures():
    rgb = Image.fromarray(noise(60, 50, 3))
    transparent = Image.fromarray(noise(60, 50, 4))
    palette = rgb.quantize(16)
    turned = Image.Exif()
    turned[0x0112] = 6
    yield "jpeg", encoded(rgb, "JPEG")
    yield "cmyk", encoded(rgb.convert("CMYK"), "JPEG")
    yield "grey jpeg", encoded(rgb.convert("L"), "JPEG")
    yield "png", encoded(rgb, "PNG")
    yield "palette", encoded(palette, "PNG")
    yield "transparent palette", encoded(palette, "PNG", transparency=3)
    yield "one bit", encoded(rgb.convert("1"), "PNG")
    yield "16 bit", encoded(Image.fromarray(noise(60, 50, 1, dtype=np.uint16)), "PNG")
    yield "grey and alpha", encoded(transparent.convert("LA"), "PNG")
    yield "alpha", encoded(transparent, "PNG")
    yield "turned", encoded(rgb, "JPEG", exif=turned)


@pytest.mark.parametrize(("name", "content"), list(pictures()))
def test_every_kind_of_file_is_decoded_as_adm_does(name, content):
    image = Image.open(io.BytesIO(content))
    image.load()
    expected = image.convert("RGB")
    decoded = decode_rgb(content)
    assert decoded.mode == "RGB" and decoded.size == (60, 50), "also of a turned one: ADM ignores EXIF"
    np.testing.assert_array_equal(np.asarray(decoded), np.asarray(expected))
    np.testing.assert_array_equal(center_crop(decoded, 32), adm(expected, 32))
