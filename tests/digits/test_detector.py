"""GenEval's rules on exact boxes of the digits world, against the world's own strict rule."""

import numpy as np
import pytest

from sprint_jax.digits.captions import parse_caption
from sprint_jax.digits.detector import detect, geneval_scores, request_of
from sprint_jax.digits.judge import Reading, is_right
from sprint_jax.digits.scenes import draw_scene, held_out_prompts
from sprint_jax.digits.worlds import get_world


def read(scene, readable=True):
    """What a perfect judge reads."""
    cells = scene.cells[0] * scene.cells[1]
    digits, colors = np.full((2, cells), -1)
    for mark in scene.marks:
        digits[mark.cell], colors[mark.cell] = mark.digit, mark.color
    return Reading(readable, scene.background, digits, colors, np.zeros((cells, 8, 8)), 0.0)


@pytest.fixture(scope="module", params=["small", "large"])
def scenes(request):
    world, generator = request.param, np.random.default_rng(0)
    captions = held_out_prompts(world, 120, 0)
    cells = get_world(world).cells
    drawn = [draw_scene(generator, parse_caption(c), cells, "test") for c in captions]
    return world, captions, [read(scene) for scene in drawn]


def test_real_scenes_are_right_and_others_mostly_wrong(scenes):
    world, captions, readings = scenes
    found = geneval_scores(readings, captions, world)
    assert found["overall"]["value"] == found["images"]["value"] == 1
    assert len(found) == 3 + len(get_world(world).categories)
    moved = captions[1:] + captions[:1]
    others = geneval_scores(readings, moved, world)["images"]["value"]
    # GenEval's rules let more pass: other digits and backgrounds are nothing to them.
    assert is_right(readings, moved, world).mean() <= others < 0.5


def test_requests_have_genevals_form():
    assert request_of("two red 3s on blue") == {
        "tag": "counting",
        "include": [{"class": "3", "count": 2, "color": "red"}],
        "exclude": [{"class": "3", "count": 3}],
        "prompt": "two red 3s on blue",
    }
    include = request_of("a 3 left of a green 7")["include"]
    assert include == [
        {"class": "7", "count": 1, "color": "green"},
        {"class": "3", "count": 1, "position": ["left of", 0]},
    ]
    assert request_of("a 3 and a red 7")["tag"] == "color_attr"


def test_boxes_are_cells_in_pixels(scenes):
    world, _, readings = scenes
    things, _ = detect(readings[-1], world)
    boxes = [thing.box for found in things.values() for thing in found]
    assert len(boxes) == (readings[-1].digits >= 0).sum()
    assert all(right - left == bottom - top == 8 for left, top, right, bottom in boxes)
    assert detect(Reading(False, 0, *[np.array([1])] * 2, None, 9.0), "small")[0] == {}
