"""Turn the bytes of an image file into pixels exactly as ADM's public code does (Dhariwal & Nichol, 2105.05233)."""

import io

import numpy as np
from PIL import Image


def decode_rgb(content: bytes) -> Image.Image:
    """Return the image converted to RGB by Pillow, whatever the file holds: CMYK, greyscale, palette, 16 bits. As in
    ADM, a transparent background is dropped and an EXIF orientation is not applied."""
    with Image.open(io.BytesIO(content)) as image:
        image.load()
        return image.convert("RGB")


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """Return ADM's centre crop, uint8 (size, size, 3): halve with a box filter while the short side is at least
    2 * `size`, resize it to `size` with a bicubic filter, then cut out the centre."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), resample=Image.Resampling.BICUBIC)
    left, top = ((side - size) // 2 for side in image.size)
    return np.asarray(image.crop((left, top, left + size, top + size)))
