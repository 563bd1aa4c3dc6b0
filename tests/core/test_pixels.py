"""Tests of pictures."""

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from sprint_jax.core import pixels as pictures
from sprint_jax.core.errors import UserError
from sprint_jax.digits.encoders import SpaceToDepth


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


@pytest.mark.parametrize("most", [1, 3, 4, 250])
def test_any_number_of_rows_takes_few_sizes(most):
    sizes = set()
    for count in range(1, 70):
        rows = pictures.batch_rows(count, most)
        sizes |= {len(batch) for batch in rows}
        every = np.concatenate(rows)
        np.testing.assert_array_equal(every[:count], np.arange(count))
        assert set(every[count:]) <= {count - 1}
        assert len(every) < count + len(rows[0]) <= max(2 * count, count + most)
    powers = {1, 2, 4, 8, 16, 32, 64, 128}
    assert sizes == {size for size in powers if size < most} | ({most} - {250})


class Recorder:
    """An autoencoder that remembers how many pictures it decodes at once, and makes one pixel of each."""

    factor = 32

    def __init__(self):
        self.batches = []

    def decode(self, latents):
        self.batches.append(len(latents))
        return latents[:, :1, :1, :3]


@pytest.mark.parametrize(("side", "expected"), [(1024, [2] * 32), (512, [8] * 8), (2048, [1] * 64)])
def test_pictures_are_decoded_by_megapixels(side, expected):
    autoencoder = Recorder()
    latents = np.broadcast_to(np.float32(0.1), (64, side // 32, side // 32, 32))
    assert (
        len(pictures.decode_bytes(autoencoder, latents)) == 64 and autoencoder.batches == expected
    )


def test_bytes_are_those_of_the_whole_batch():
    random = np.random.default_rng(0)
    latents = random.standard_normal((5, 4, 6, 12)).astype(np.float32)
    expected = pictures.to_bytes(SpaceToDepth().decode(latents))
    for made in (latents, jnp.asarray(latents)):
        found = pictures.decode_bytes(SpaceToDepth(), made, at_once=2 * 96)
        assert found.dtype == np.uint8 and isinstance(found, np.ndarray)
        np.testing.assert_array_equal(found, expected)
