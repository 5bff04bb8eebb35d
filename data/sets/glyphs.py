"""Capital letters and digits of the fonts in some Debian packages: about 21,000 real 16x16 images of 36 classes.

Needs the packages in `PACKAGES` (31 MB), no two of which contain clones of one typeface; other fonts on the machine are
ignored. The same files and the same version of Pillow give the same images.
"""

import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data.errors import DataError

FONTS = Path("/usr/share/fonts")
PACKAGES = {
    "fonts-aenigma": "truetype/aenigma",
    "fonts-b612": "opentype/b612",
    "fonts-cabin": "opentype/cabin",
    "fonts-cantarell": "opentype/cantarell",
    "fonts-cmu": "truetype/cmu",
    "fonts-comic-neue": "opentype/comic-neue",
    "fonts-dosis": "opentype/dosis",
    "fonts-dustin": "truetype/dustin",
    "fonts-ebgaramond": "opentype/ebgaramond",
    "fonts-georgewilliams": "truetype/fonts-georgewilliams",
    "fonts-gotico-antiqua": "opentype/gotico-antiqua",
    "fonts-inter": "opentype/inter",
    "fonts-karla": "truetype/karla",
    "fonts-lato": "truetype/lato",
    "fonts-league-mono": "opentype/league-mono",
    "fonts-liberation": "truetype/liberation",
    "fonts-linuxlibertine": "opentype/linux-libertine",
    "fonts-open-sans": "truetype/open-sans",
    "fonts-paratype": "truetype/paratype",
    "fonts-quicksand": "truetype/quicksand",
    "fonts-roboto-unhinted": "truetype/roboto/unhinted",
    "fonts-tuffy": "truetype/tuffy",
    "fonts-vollkorn": "truetype/vollkorn",
    "fonts-yanone-kaffeesatz": "opentype/yanone-kaffeesatz",
}  # and their folders in FONTS
CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
UNMAPPED = "\uffff"  # not a character in any font: drawn as the font draws characters that it lacks
SIDE, MARGIN = 16, 1
SIZE = 48  # pixels per em before glyphs are scaled down


def load(split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Return (x (n, 1, 16, 16) in [-1, 1], label (n,), features (n, 64), number of classes).

    A fifth of the font families, chosen by their names, is held out: no family is in both splits, and no image appears
    twice. Raise DataError if packages are missing.
    """
    ink, label, families = _all_glyphs(FONTS)
    chosen = np.array([held_out(family) for family in families]) == (split == "heldout")
    x = (ink[chosen] / 127.5 - 1).astype(np.float32)[:, None]
    return x, label[chosen], blocks(ink[chosen]), len(CHARACTERS)


def held_out(family: str) -> bool:
    """Return whether the fonts of a family are held out from training."""
    return zlib.crc32(family.encode()) % 5 == 0


def blocks(ink: np.ndarray) -> np.ndarray:
    """Return the ink in each 2x2 block of pixels of images (n, h, w), as (n, h w / 4).

    Strokes a pixel apart then look similar, and whole numbers give the same neighbors on every machine.
    """
    n, height, width = ink.shape
    return ink.astype(np.float32).reshape(n, height // 2, 2, width // 2, 2).sum(axis=(2, 4)).reshape(n, -1)


@lru_cache(maxsize=1)
def _all_glyphs(fonts: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (ink (n, 16, 16) uint8, label (n,), font family (n,)) in the order of the files' paths and CHARACTERS."""
    drawn = {path: glyphs for path in _font_files(fonts) if (glyphs := draw_glyphs(path)) is not None}
    readable = are_letters(np.stack([ink for ink, _ in drawn.values()]))
    ink = np.concatenate([ink for (ink, _), good in zip(drawn.values(), readable, strict=True) if good])
    families = [name for (_, name), good in zip(drawn.values(), readable, strict=True) if good]
    label, family = np.tile(np.arange(len(CHARACTERS)), len(families)), np.repeat(families, len(CHARACTERS))
    _, first = np.unique(ink.reshape(len(ink), -1), axis=0, return_index=True)
    kept = np.sort(first)
    return ink[kept], label[kept], family[kept]


def _font_files(fonts: Path) -> list[Path]:
    found = {
        package: [path for path in (fonts / folder).rglob("*") if path.suffix.lower() in (".otf", ".ttf")]
        for package, folder in PACKAGES.items()
    }
    missing = [package for package, paths in found.items() if not paths]
    if missing:
        raise DataError(
            f"data.name=glyphs: fonts are missing below {fonts}; apt-get install --no-install-recommends"
            f" {' '.join(missing)}"
        )
    return sorted((path for paths in found.values() for path in paths), key=lambda path: path.as_posix())


def draw_glyphs(path: Path) -> tuple[np.ndarray, str] | None:
    """Return (ink (36, 16, 16) uint8, family: the first word of the font's name), or None if it lacks a character."""
    font = ImageFont.truetype(path, SIZE, layout_engine=ImageFont.Layout.BASIC)
    lacking, *images = (_draw(font, character) for character in UNMAPPED + CHARACTERS)
    found = [image for image in images if image is not None and image != lacking]
    if len(found) < len(CHARACTERS):
        return None
    return np.stack([_fitted(image) for image in found]), str(font.getname()[0]).split()[0].lower()


def _draw(font: ImageFont.FreeTypeFont, character: str) -> Image.Image | None:
    """Return a character cropped to its ink, or None if there is no ink."""
    image = Image.new("L", (4 * SIZE, 4 * SIZE))
    ImageDraw.Draw(image).text((2 * SIZE, 2 * SIZE), character, 255, font, anchor="mm")
    box = image.getbbox()
    return image.crop(box) if box else None


def _fitted(image: Image.Image) -> np.ndarray:
    """Return the image scaled to the size that the margin allows, in the middle of (SIDE, SIDE)."""
    scale = (SIDE - 2 * MARGIN) / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    small = image.resize(size, Image.Resampling.BOX)
    canvas = Image.new("L", (SIDE, SIDE))
    canvas.paste(small, ((SIDE - small.width) // 2, (SIDE - small.height) // 2))
    return np.asarray(canvas)


def are_letters(ink: np.ndarray) -> np.ndarray:
    """Return which fonts of (m, 36, 16, 16) show the right characters, (m,) bool.

    At least a third of their characters are nearest, by correlation, to the mean of all fonts for that character. Other
    fonts are pictures, other scripts, or unreadable.
    """
    glyphs = ink.reshape(*ink.shape[:2], -1).astype(np.float64)
    mean = glyphs.mean(axis=0)
    glyphs, mean = (each - each.mean(axis=-1, keepdims=True) for each in (glyphs, mean))
    likeness = glyphs @ (mean / np.linalg.norm(mean, axis=1, keepdims=True)).T
    return (likeness.argmax(axis=2) == np.arange(ink.shape[1])).mean(axis=1) >= 1 / 3
