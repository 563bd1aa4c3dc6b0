"""The judge: real scenes read back; means, noise and wrong pictures do not."""

import dataclasses

import numpy as np
import pytest

from sprint_jax.core.errors import UserError
from sprint_jax.digits import judge as judging
from sprint_jax.digits import scenes
from sprint_jax.digits.captions import parse_caption
from sprint_jax.digits.judge import Judge, PixelFeatures, diversity, frechet_distance
from sprint_jax.digits.scenes import Mark, Scene, draw_images, handwriting, held_out_prompts
from sprint_jax.digits.worlds import WORLDS, get_world
from sprint_jax.metrics.frechet import frechet

RED, GREEN, BLUE, YELLOW, PURPLE, CYAN = range(6)


@pytest.fixture(scope="module")
def judges():
    return {world: Judge.fit(world) for world in WORLDS}


def picture(scene: Scene) -> np.ndarray:
    return scenes.to_float(scenes.render(scene))


@pytest.mark.parametrize("world", WORLDS)
def test_held_out_scenes_read_back(judges, world):
    prompts = held_out_prompts(world, 1200, seed=1)
    images = draw_images(world, prompts, "test", seed=2)
    readings = judges[world].read(images)
    report = judging.prompt_accuracy(readings, prompts, world)
    # Measured over 3,000: 0.990 (small) and 0.984 (large), what the classifier makes of handwriting.
    share = report["overall"]["accuracy"]
    assert share >= 0.97
    assert report["overall"]["standard_error"] == pytest.approx(np.sqrt(share * (1 - share) / 1200))
    categories = get_world(world).categories
    assert set(report) == {"overall", *categories}
    for category in categories:
        assert report[category]["count"] == 1200 // len(categories)
        assert report[category]["accuracy"] >= 0.95
    assert all(reading.readable for reading in readings)
    assert max(reading.residual for reading in readings) < 0.004  # uint8 rounding
    # Noise as a model leaves it does not matter.
    noise = np.random.default_rng(0).normal(0, 0.1, images.shape)
    assert judges[world].right(images + noise, prompts).mean() >= 0.97


@pytest.mark.parametrize("world", WORLDS)
def test_the_mean_image_of_a_caption_is_wrong(judges, world):
    prompts = sorted(set(held_out_prompts(world, 60, seed=3)))
    for prompt in prompts:
        images = draw_images(world, [prompt] * 100, "train", seed=4)
        assert not judges[world].right(images.mean(0, keepdims=True), [prompt])[0], prompt
        assert judges[world].right(images, [prompt] * 100).all()


@pytest.mark.parametrize("world", WORLDS)
def test_noise_and_flat_grey_are_unreadable(judges, world):
    generator, shape = np.random.default_rng(0), (200, *get_world(world).size, 3)
    grey = generator.normal(0, 1, (*shape[:3], 1)) * np.ones(3)
    noise = [generator.normal(0, sigma, shape) for sigma in (1, 0.1)]
    for images in (*noise, grey, np.zeros(shape), np.full(shape, np.nan)):
        assert not any(reading.readable for reading in judges[world].read(images))


def test_a_single_nan_makes_its_image_unreadable_and_no_other(judges):
    images = draw_images("large", ["a red 3"] * 3, "train", seed=0)
    images[1, 0, 15, 2] = np.nan
    assert judges["large"].right(images, ["a red 3"] * 3).tolist() == [True, False, True]


def test_a_color_between_two_of_the_palette_is_unreadable(judges):
    orange = (scenes.PALETTE[RED] + scenes.PALETTE[YELLOW]) / 2
    ink, _ = scenes.strokes()
    ground = scenes.PALETTE[BLUE]
    images = ground + ink[handwriting("train")[4], ..., None] * (orange - ground)
    assert not any(reading.readable for reading in judges["small"].read(images))


RIGHT = Scene((2, 2), BLUE, (Mark(0, 3, RED, 0), Mark(1, 7, GREEN, 0)))
CAPTION = "a red 3 left of a green 7 on blue"


def changed(index: int, **fields) -> tuple[Mark, ...]:
    marks = list(RIGHT.marks)
    marks[index] = dataclasses.replace(marks[index], **fields)
    return tuple(marks)


WRONG = {
    "color": {"marks": changed(0, color=CYAN)},
    "colors swapped": {"marks": (Mark(0, 3, GREEN, 0), Mark(1, 7, RED, 0))},
    "background": {"background": PURPLE},
    "digit": {"marks": changed(1, digit=1)},
    "digits swapped": {"marks": (Mark(1, 3, RED, 0), Mark(0, 7, GREEN, 0))},
    "place below": {"marks": changed(1, cell=2)},
    "place across": {"marks": changed(1, cell=3)},
    "one more": {"marks": (*RIGHT.marks, Mark(3, 7, GREEN, 0))},
    "one less": {"marks": RIGHT.marks[:1]},
    "none": {"marks": ()},
}


def test_a_scene_that_is_wrong_in_one_way_is_judged_wrong(judges):
    def image(scene):
        hands = handwriting("train")
        marks = (dataclasses.replace(m, handwriting=hands[m.digit][9]) for m in scene.marks)
        return picture(dataclasses.replace(scene, marks=tuple(marks)))

    scenes = {"right": RIGHT} | {k: dataclasses.replace(RIGHT, **v) for k, v in WRONG.items()}
    images = np.stack([image(scene) for scene in scenes.values()])
    right = judges["large"].right(images, [CAPTION] * len(images))
    assert dict(zip(scenes, right, strict=True)) == {"right": True} | dict.fromkeys(WRONG, False)


@pytest.mark.parametrize(
    ("shown", "asked", "right"),
    [
        ("two 3s", "a 3", False),
        ("a 3", "two 3s", False),
        ("two red 3s", "two 3s", True),
        ("a red 3 and a blue 7", "a 7 and a 3", True),
        ("a red 3 and a blue 7", "a red 3 and a 7", True),
        ("a red 3 and a blue 7", "a blue 3 and a red 7", False),
        ("a red 3 and a blue 7", "a red 3", False),
        ("a 3 above a 7", "a 7 below a 3", True),
        ("a 3 above a 7", "a 3 below a 7", False),
        ("a 3 above a 7", "a 3 left of a 7", False),
        ("a 3 left of a 7", "a 7 right of a 3", True),
        ("a 3 left of a 7", "a 3 and a 7", True),
        ("a red 3 on cyan", "a 3 on cyan", True),
        ("a red 3 on cyan", "a 3 on blue", False),
    ],
)
def test_a_caption_asks_for_what_it_says_and_nothing_else(judges, shown, asked, right):
    images = draw_images("large", [shown] * 20, "train", seed=0)
    assert (judges["large"].right(images, [asked] * 20) == right).all()


def test_frechet_of_known_gaussians():
    generator = np.random.default_rng(0)
    white = generator.normal(size=(4000, 8))
    _, _, basis = np.linalg.svd(white - white.mean(0), full_matrices=False)
    white = (white - white.mean(0)) @ basis.T
    white /= white.std(0, ddof=1)  # mean 0 and covariance I, exactly
    scales, shift = np.linspace(0.5, 2, 8), np.arange(8.0)
    expected = np.square(shift).sum() + np.square(scales - 1).sum()
    assert frechet(white, white * scales + shift) == pytest.approx(expected, rel=1e-9)
    assert frechet(white, white) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("world", WORLDS)
def test_frechet_distance_parts_real_from_impoverished(world):
    features = PixelFeatures.fit(world)
    np.testing.assert_allclose(features.components @ features.components.T, np.eye(64), atol=1e-9)
    prompts = held_out_prompts(world, 1500, seed=1)
    images = draw_images(world, prompts[:500], "train", seed=5)
    real = draw_images(world, prompts, "test", seed=6)
    report = frechet_distance(images, real, features)
    assert 0 < report["standard_error"] < report["distance"]
    assert abs(report["distance"] - report["real"]) < 4 * report["standard_error"]
    for poor in (images * 0.7, np.roll(images, 2, axis=2), images[::10].repeat(10, 0)):
        assert frechet_distance(poor, real, features)["distance"] > 2 * report["distance"]


def test_frechet_error_is_that_of_fresh_pictures():
    """Of 64 features, as many as the judge's; the distance is the plain one."""
    random = np.random.default_rng(0)
    draw = [(random.normal(0.3, 1, (256, 64)), random.normal(size=(768, 64))) for _ in range(40)]
    found = [frechet_distance(*pair, lambda x: x) for pair in draw]
    images, real = draw[0]
    reference = real[np.random.default_rng(0).permutation(768)][256:]
    assert found[0]["distance"] == frechet(images, reference)
    spread = np.std([each["distance"] for each in found], ddof=1)
    errors = [each["standard_error"] for each in found]
    assert np.mean(errors) == pytest.approx(spread, rel=0.25)
    assert np.std(errors) < 0.1 * np.mean(errors)


def test_diversity_is_one_for_real_scenes_and_falls_with_each_collapse(judges):
    prompts = [prompt for prompt in held_out_prompts("large", 24, seed=1) for _ in range(16)]
    prompts = sorted(prompts)
    images = draw_images("large", prompts, "train", seed=2)

    def measure(images):
        return diversity(judges["large"].read(images), prompts, "large")

    real = measure(images)
    assert real["groups"] == len(set(prompts))
    for name in ("color", "handwriting", "combined"):
        assert real[name] == pytest.approx(1, abs=0.06)

    # One image for each caption, 16 times.
    collapsed = measure(images[[prompts.index(prompt) for prompt in prompts]])
    assert collapsed["color"] < 1e-6 and collapsed["combined"] < 1e-3

    # One handwriting of each digit, in all colours.
    generator, hands, images = np.random.default_rng(3), handwriting("train"), []
    for prompt in prompts:
        scene = scenes.draw_scene(generator, parse_caption(prompt), (2, 2), "train")
        marks = (dataclasses.replace(m, handwriting=hands[m.digit][0]) for m in scene.marks)
        images.append(picture(dataclasses.replace(scene, marks=tuple(marks))))
    one_hand = measure(np.stack(images))
    assert one_hand["handwriting"] < 0.02 and one_hand["color"] == pytest.approx(1, abs=0.06)

    # Noise is no variety.
    nothing = measure(np.random.default_rng(0).normal(0, 1, (len(prompts), 16, 16, 3)))
    assert nothing["groups"] == 0 and np.isnan(nothing["combined"])


def test_mistakes(judges):
    images = draw_images("large", ["a 3"] * 2, "test", seed=0)
    with pytest.raises(UserError, match=r"\(2, 16, 16, 3\).*'small'"):
        judges["small"].read(images)
    with pytest.raises(UserError, match=r"2 .* 1 "):
        judges["large"].right(images, ["a 3"])
    with pytest.raises(UserError, match="'a cat'"):
        judges["large"].right(images, ["a 3", "a cat"])
    features = PixelFeatures(np.zeros(768), np.eye(64, 768))
    with pytest.raises(UserError, match="128 and 256"):
        frechet_distance(images, images, features)
    with pytest.raises(UserError, match="non-finite"):
        frechet_distance(np.full((128, 16, 16, 3), np.nan), np.zeros((256, 16, 16, 3)), features)
