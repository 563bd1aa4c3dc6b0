"""Tests of pictures."""

import numpy as np
import pytest
from PIL import Image

from sprint_jax.core import pixels as pictures
from sprint_jax.core.errors import UserError


def test_bytes_cover_the_range_and_round():
    pixels = np.array([-9, -1, -1 + 1 / 255, 0.0, 1, 3])
    np.testing.assert_array_equal(pictures.to_bytes(pixels), [0, 0, 0, 128, 255, 255])


def test_every_size_is_nearest_to_itself_and_about_a_megapixel():
    assert len(set(pictures.SIZES_1024)) == 33
    for height, width in pictures.SIZES_1024:
        assert height % 32 == width % 32 == 0
        assert 0.89 < height * width / 1024**2 <= 1.04
        assert pictures.nearest_size(height, width) == (height, width)
    assert pictures.nearest_size(512, 512) == (1024, 1024)
    assert pictures.nearest_size(720, 1280) == (768, 1344)
    assert pictures.nearest_size(1000, 600) == (1280, 768)


def test_resizing_keeps_a_ramp_and_cuts_the_middle():
    ramp = np.broadcast_to(np.arange(16, dtype=np.float32)[None, None, :, None], (1, 8, 16, 3))
    assert pictures.resize_and_crop(ramp, 8, 16) is ramp
    twice = np.asarray(pictures.resize_and_crop(ramp, 16, 16))
    assert twice.shape == (1, 16, 16, 3)
    np.testing.assert_allclose(twice[0, 0, :, 0], np.arange(3.75, 11.5, 0.5), atol=1e-5)


def test_images_become_pixels():
    image = Image.new("RGBA", (30, 20), (255, 0, 255, 9))
    pixels = pictures.to_pixels(image, 3, 8, 4)
    assert pixels.shape == (3, 8, 4, 3) and pixels.dtype == np.float32
    np.testing.assert_allclose(pixels[2, 7, 3], [1, -1, 1])
    rows = [np.full((8, 4, 3), 51 * i, np.uint8) for i in (0, 5)]
    np.testing.assert_allclose(pictures.to_pixels(rows, 2, 8, 4)[:, 0, 0, 0], [-1, 1])


@pytest.mark.parametrize(
    "images, message",
    [
        ([Image.new("L", (4, 8))] * 2, "2 images for 3 pictures"),
        ([], "0 images for 3 pictures"),
        (np.zeros((8, 4, 4), np.uint8), r"uint8 \(8, 4, 4\)"),
        (np.zeros((8, 4, 3), np.float32), r"float32 \(8, 4, 3\)"),
    ],
)
def test_what_is_no_image(images, message):
    with pytest.raises(UserError, match=message):
        pictures.to_pixels(images, 3, 8, 4)
