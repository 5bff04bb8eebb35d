"""Glyphs of installed fonts: what is drawn, what is left out, and that the splits share nothing."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import ImageFont

from data.errors import DataError
from data.sets import glyphs
from data.sets.arrays import ArrayImages
from data.sets.registry import DataConfig, open_images
from trainer.config.tree import load_config

SPLITS = ("train", "heldout")


@pytest.fixture(scope="module")
def splits():
    try:
        return {split: open_images(DataConfig(name="glyphs"), split) for split in SPLITS}
    except DataError as error:
        pytest.skip(str(error))


@pytest.fixture
def default_font(tmp_path):
    """The font that comes inside Pillow, as a file."""
    path = tmp_path / "default.ttf"
    path.write_bytes(ImageFont.load_default(12).path.getvalue())
    return path


@pytest.mark.parametrize("split", SPLITS)
def test_there_are_thousands_of_images_of_36_classes_in_about_equal_parts(splits, split):
    images = splits[split]
    assert isinstance(images, ArrayImages) and images.num_classes == 36 and images.shape == (1, 16, 16)
    counts = np.bincount(images.label, minlength=36)
    assert len(counts) == 36 and counts.min() > 0.6 * counts.max()
    assert counts.min() >= {"train": 300, "heldout": 60}[split]
    assert images.x.dtype == np.float32 and (images.x.min(), images.x.max()) == (-1, 1)
    assert images.label.dtype == np.int64 and not images.mirrored


def test_no_font_family_is_in_both_splits_and_no_image_is_there_twice(splits):
    ink, label, family = glyphs._all_glyphs(glyphs.FONTS)
    held_out = {name for name in set(family) if glyphs.held_out(name)}
    assert len(set(family)) > 150 and len(held_out) > 30
    for split, images in splits.items():
        mine = np.isin(family, sorted(held_out)) == (split == "heldout")
        np.testing.assert_array_equal(((images.x[:, 0] + 1) * 127.5).round(), ink[mine])
        np.testing.assert_array_equal(images.label, label[mine])
    everything = np.concatenate([images.x for images in splits.values()]).reshape(len(ink), -1)
    assert len(np.unique(everything, axis=0)) == len(everything)


def test_every_glyph_fills_the_square_within_the_margin_and_stands_in_its_middle(splits):
    for images in splits.values():
        inked = images.x[:, 0] > -1
        assert not inked[:, [0, -1]].any() and not inked[:, :, [0, -1]].any()
        sides = []
        for axis in (1, 2):
            lines = inked.any(axis=3 - axis)
            first, last = lines.argmax(axis=1), 15 - lines[:, ::-1].argmax(axis=1)
            sides.append(last - first + 1)
            whole = sides[-1] == 14
            assert (abs(first + last - 15)[whole] == 0).all()
        largest = np.maximum(*sides)
        assert np.mean(largest == 14) > 0.95  # faint ends of a stroke may be rounded to nothing
        assert largest.min() >= 12


def test_features_are_whole_numbers_of_ink(splits):
    images = splits["heldout"]
    assert (images.features == images.features.round()).all() and images.features.max() <= 4 * 255
    ink = (images.x[:, 0].astype(np.float64) + 1) * 127.5
    corner = ink[:, 4:6, 10:12].sum(axis=(1, 2))
    np.testing.assert_allclose(images.features.reshape(-1, 8, 8)[:, 2, 5], corner, atol=1e-3)


def test_another_process_draws_the_same_images(splits):
    code = "from data.sets.registry import *; print(open_images(DataConfig(name='glyphs'), 'heldout').identity)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == splits["heldout"].identity != splits["train"].identity


def test_nearly_every_image_has_15_others_above_the_threshold_of_the_config(splits):
    threshold = load_config("configs/glyphs.yaml").groups.threshold
    features = splits["train"].features / np.linalg.norm(splits["train"].features, axis=1, keepdims=True)
    chosen = np.random.default_rng(0).choice(len(features), 1000, replace=False)
    near = (features[chosen] @ features.T >= threshold).sum(axis=1) - 1
    assert np.mean(near >= 15) > 0.94
    assert np.mean(near >= len(features) // 4) == 0, "and not everything is like everything"


def test_missing_packages_are_named_in_one_line(tmp_path, monkeypatch, default_font):
    monkeypatch.setattr(glyphs, "FONTS", tmp_path / "fonts")
    for folder in ("truetype/lato", "truetype/roboto/unhinted/RobotoTTF"):
        (tmp_path / "fonts" / folder).mkdir(parents=True)
        (tmp_path / "fonts" / folder / "a.ttf").write_bytes(default_font.read_bytes())
    with pytest.raises(DataError, match=r"^data\.name=glyphs: fonts are missing .*; apt-get install") as error:
        open_images(DataConfig(name="glyphs"))
    named = {word for word in str(error.value).split() if word.startswith("fonts-")}
    assert named == glyphs.PACKAGES.keys() - {"fonts-lato", "fonts-roboto-unhinted"}
    assert "\n" not in str(error.value)


def test_a_font_that_lacks_a_character_is_left_out(default_font, monkeypatch):
    ink, family = glyphs.draw_glyphs(default_font)
    assert ink.shape == (36, 16, 16) and ink.dtype == np.uint8 and family == "aileron"
    assert len(np.unique(ink.reshape(36, -1), axis=0)) == 36
    for more, kept in (("&", True), ("漢", False), (" ", False)):
        monkeypatch.setattr(glyphs, "CHARACTERS", "AB" + more)
        assert (glyphs.draw_glyphs(default_font) is not None) == kept


@pytest.mark.parametrize("seed", range(3))
def test_fonts_of_pictures_or_with_letters_in_other_places_are_told_from_letters(seed):
    rng = np.random.default_rng(seed)
    letters = rng.integers(256, size=(36, 16, 16))
    fonts = (letters * rng.uniform(0.3, 1, size=(200, 36, 1, 1)) + rng.normal(scale=20, size=(200, 36, 16, 16))).clip(
        0, 255
    )
    fonts[3] = rng.integers(256, size=(36, 16, 16))
    fonts[7] = np.roll(fonts[7], 1, axis=0)
    fonts[11, :20] = fonts[11, 1:21]  # less than a half is right, more than a third
    fonts[15, :30] = fonts[15, 1:31]
    expected = ~np.isin(np.arange(200), [3, 7, 15])
    np.testing.assert_array_equal(glyphs.are_letters(fonts.astype(np.uint8)), expected)
