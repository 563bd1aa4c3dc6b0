"""Sketches of the digits world, and how pictures are measured against them."""

import numpy as np
import pytest
from helpers.refusals import refuse

from sprint_jax.core.pixels import to_bytes
from sprint_jax.digits.captions import parse_caption
from sprint_jax.digits.judge import Judge
from sprint_jax.digits.scenes import draw_images, draw_scene, held_out_prompts, render, strokes
from sprint_jax.digits.sketches import (
    MIN_INK,
    draw_sketches,
    measure_control,
    stroke_iou,
    summarize_iou,
)
from sprint_jax.digits.worlds import WORLDS, get_world

RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize("world", WORLDS)
def test_a_sketch_is_the_ink_of_the_handwriting(world):
    cells = get_world(world).cells
    for caption in held_out_prompts(world, 12, 0):
        scene = draw_scene(RANDOM, parse_caption(caption), cells, "test")
        expected = np.zeros((cells[0], 8, cells[1], 8))
        for mark in scene.marks:
            row, column = divmod(mark.cell, cells[1])
            expected[row, :, column] = strokes()[0][mark.handwriting] >= MIN_INK
        (found,) = draw_sketches(render(scene)[None])
        np.testing.assert_array_equal(found, 255 * expected.reshape(found.shape))


def test_pictures_are_measured_against_sketches():
    images = draw_images("full", held_out_prompts("full", 240, 0), "test", 0)
    sketches = draw_sketches(to_bytes(images))
    assert stroke_iou(images, sketches).tolist() == [1.0] * 240
    noisy = images + 0.1 * RANDOM.normal(size=images.shape).astype(np.float32)
    assert summarize_iou(stroke_iou(noisy, sketches))["iou"] > 0.9
    # The yardstick of a goal: pictures that follow another's sketch.
    other = summarize_iou(stroke_iou(images, RANDOM.permutation(sketches)))
    assert 0.2 < other["iou"] < 0.35 and 0 < other["standard_error"] < 0.02
    ground = np.broadcast_to(images[:1, :1, :1], images.shape)
    assert not stroke_iou(ground, sketches).any()
    assert stroke_iou(ground, np.zeros_like(sketches)).all()
    half = np.where(np.arange(16)[None, None, :, None] < 8, images, np.nan)
    assert stroke_iou(half, sketches).max() <= 1 and not stroke_iou(half * np.nan, sketches).any()


def test_iou_counts_pixels():
    image = draw_images("small", ["a red 3 on blue"], "test", 0)
    (sketch,) = draw_sketches(to_bytes(image))
    ink, ground = np.argwhere(sketch)[0], np.argwhere(sketch == 0)[0]
    less, more = sketch.copy(), sketch.copy()
    less[tuple(ink)], more[tuple(ground)] = 0, 255
    count = (sketch > 0).sum()
    assert stroke_iou(image, less[None])[0] == pytest.approx((count - 1) / count)
    assert stroke_iou(image, more[None])[0] == pytest.approx(count / (count + 1))


def test_pictures_of_no_digits_world_are_refused():
    refuse(draw_sketches, np.zeros((1, 8, 20, 3), np.uint8), parts=["8x20"], exit_code=1)


def test_a_network_is_measured_with_right_shuffled_and_empty_sketches():
    """One that paints the sketch red on cyan, and draws a scene of its own where the branch does not count."""
    prompts = held_out_prompts("small", 60, 0)
    own = to_bytes(draw_images("small", prompts, "test", 5))
    asked = []

    def draw(captions, maps, scale):
        asked.append((list(captions) == prompts, scale))
        cyan, red = np.uint8([0, 255, 255]), np.uint8([255, 0, 0])
        return np.where(maps > 0, red, cyan) if scale else own

    found = measure_control(draw, Judge.fit("small"), prompts, scales=(0.0, 1.0))
    assert asked == [(True, 0.0), (True, 1.0)] * 3
    numbers = {(each["sketch"], each["scale"]): each for each in found}
    iou = {key: each["iou"]["iou"] for key, each in numbers.items()}
    assert iou["right", 1.0] == 1.0 and iou["empty", 1.0] == 0.0 < iou["shuffled", 1.0] < 0.45
    assert len({iou[name, 0.0] for name in ("right", "shuffled", "empty")}) == 1
    assert (
        numbers["shuffled", 1.0]["followed"]["iou"]
        == numbers["empty", 1.0]["followed"]["iou"]
        == 1.0
    )
    accuracy = {key: each["accuracy"]["overall"]["accuracy"] for key, each in numbers.items()}
    assert accuracy["right", 0.0] > 0.9 > 0.1 > accuracy["shuffled", 1.0]
