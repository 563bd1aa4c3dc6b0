"""Buckets: tables, sizes of a config, and the arithmetic of resizing and cutting."""

import numpy as np
import pytest
from PIL import Image

from sprint_jax.core.errors import UserError
from sprint_jax.core.pixels import SIZES_1024
from sprint_jax.data.buckets import (
    SIZES_2048,
    check_factor,
    choose_sizes,
    describe_resolution,
    fit_image,
    merge_sizes,
    size_table,
)


def picture(height: int, width: int) -> np.ndarray:
    """Smooth colours with some noise, so that every resampling gives something else."""
    y, x = np.mgrid[:height, :width]
    smooth = np.stack([y * 255 / height, x * 255 / width, 127 + 100 * np.sin(x / 3 + y / 5)], -1)
    noise = np.random.default_rng(0).normal(0, 20, smooth.shape)
    return np.clip(smooth + noise, 0, 255).astype(np.uint8)


def published(image: np.ndarray, size: tuple[int, int], how=Image.Resampling.BICUBIC) -> np.ndarray:
    """NVlabs' SanaWebDatasetMS in its floating-point words, with torchvision's functions on PIL images."""
    height, width = size
    old_height, old_width = image.shape[:2]
    if height / old_height > width / old_width:
        resized = height, int(old_width * height / old_height)
    else:
        resized = int(old_height * width / old_width), width
    larger = Image.fromarray(image).resize((resized[1], resized[0]), how)
    top, left = round((resized[0] - height) / 2.0), round((resized[1] - width) / 2.0)
    return np.asarray(larger.crop((left, top, left + width, top + height)))


def test_tables_have_the_published_numbers_of_sizes_and_pixels():
    for resolution, count in {256: 33, 512: 33, 1024: 33, 2048: 40, 4096: 40}.items():
        table = size_table(resolution)
        assert len(set(table)) == count and (resolution, resolution) in table
        assert all(0.85 < h * w / resolution**2 < 1.06 for h, w in table)
        assert [h / w for h, w in table] == sorted(h / w for h, w in table)
        if resolution > 256:
            check_factor(table, 32)
    assert size_table(1024) == SIZES_1024 and size_table(2048) == SIZES_2048
    assert size_table(512)[:2] == ((256, 1024), (256, 928))
    assert size_table(4096)[-1] == (8192, 2048)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: choose_sizes(768, ()), r"data\.resolution is 768.*data\.sizes"),
        (lambda: choose_sizes(1024, ("0x8",)), r"data\.sizes 0x8"),
        (lambda: choose_sizes(1024, ("8 x 16",)), r"data\.sizes 8 x 16"),
        (lambda: choose_sizes(1024, ("8x16", "16x8", "8x16")), r"data\.sizes"),
        (lambda: check_factor([(8, 16), (8, 15)], 2), r"8x15.* 2"),
        (lambda: check_factor(size_table(256), 32), r"128x464.* 32"),
    ],
)
def test_sizes_that_cannot_be_are_named(call, named):
    with pytest.raises(UserError, match=named) as raised:
        call()
    assert raised.value.exit_code == 2


def test_sizes_of_a_config_take_the_place_of_the_table():
    assert choose_sizes(1024, ("8x16", "16x8")) == ((8, 16), (16, 8))
    assert choose_sizes(512, ()) == size_table(512) == choose_sizes(512, (), 33)
    few = ((512, 2048), (704, 1408), (1024, 1024), (1408, 704), (2048, 512))
    assert choose_sizes(1024, (), 5) == few
    assert choose_sizes(1024, (), 1) == ((1024, 1024),)
    for most in (2, 8, 9, 32):
        assert len(set(choose_sizes(1024, (), most)) & set(size_table(1024))) == most


@pytest.mark.parametrize(
    ("counts", "at_least", "expected"),
    [
        ((9, 9, 9, 9), 9, (0, 1, 2, 3)),
        ((9, 3, 9, 1), 9, (0, 2, 2, 2)),
        ((6, 2, 3, 1), 4, (0, 2, 2, 2)),
        ((4, 3, 2, 1), 6, (1, 1, 1, 1)),
        ((1, 0, 0, 1), 9, (3, 1, 2, 3)),
        ((0, 5, 0, 0), 9, (0, 1, 2, 3)),
    ],
)
def test_sizes_join_the_next_in_aspect_until_each_fills_a_batch(counts, at_least, expected):
    sizes = ((8, 32), (8, 16), (8, 12), (16, 8))
    target = merge_sizes(sizes, counts, at_least)
    # The same for every order of the sizes.
    turned = merge_sizes(sizes[::-1], counts[::-1], at_least)
    assert [3 - t for t in turned[::-1]] == target
    left = {t: sum(n for n, u in zip(counts, target, strict=True) if u == t) for t in target}
    assert min([n for n in left.values() if n]) >= min(at_least, sum(counts))
    assert tuple(target) == expected


@pytest.mark.parametrize(
    "old", [(100, 100), (37, 91), (91, 37), (16, 16), (15, 33), (7, 9), (50, 201), (64, 48)]
)
@pytest.mark.parametrize("size", [(16, 16), (12, 20), (40, 24)])
def test_images_are_resized_and_cut_as_in_published_training_data(old, size):
    image = picture(*old)
    found = fit_image(image, size)
    assert found.shape == (*size, 3) and found.dtype == np.uint8
    np.testing.assert_array_equal(found, published(image, size))
    if old == size:
        np.testing.assert_array_equal(found, image)


def test_two_thousand_pixels_are_resized_with_lanczos():
    wide, size = picture(75, 300), (1024, 4096)
    found = fit_image(wide, size)
    np.testing.assert_array_equal(found, published(wide, size, Image.Resampling.LANCZOS))


def test_no_row_is_lost_where_float_division_is_short():
    for old in range(3, 200):
        assert fit_image(np.zeros((old, 2 * old, 3), np.uint8), (17, 34)).shape == (17, 34, 3)


def test_a_thread_of_an_image_is_refused_before_memory_is_spent():
    with pytest.raises(ValueError, match=r"1x60000 .* 512x2048"):
        fit_image(np.zeros((1, 60000, 3), np.uint8), (512, 2048))


def test_latents_of_another_resolution_than_the_network_are_told():
    sources = [{(32, 32): range(9), (16, 64): range(2)}, {(16, 64): range(5), (28, 36): range(3)}]
    assert describe_resolution(sources, 32) == ""
    assert describe_resolution(sources, 24) == describe_resolution(sources, 45) == ""
    for size in (16, 64):
        line = describe_resolution(sources, size)
        assert f"sample_size={size}," in line and "sample_size=32 " in line
