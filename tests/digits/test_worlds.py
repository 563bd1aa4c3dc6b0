"""The digits world: captions, scenes, and the TFDS data set."""

import subprocess
import sys
import time

import numpy as np
import pytest

from sprint_jax.core.errors import UserError
from sprint_jax.digits import captions, dataset, scenes
from sprint_jax.digits.captions import Prompt, Thing, parse_caption, write_caption
from sprint_jax.digits.dataset import open_digits
from sprint_jax.digits.scenes import Mark, Scene, draw_scene, handwriting
from sprint_jax.digits.worlds import WORLDS, get_world

RED, GREEN, BLUE, YELLOW, PURPLE, CYAN = range(6)
FIRST_HELD_OUT = [536, 70, 851, 143, 613, 495, 1222, 182, 1583, 895]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("digits")


def draws(world: str, count: int):
    generator = np.random.default_rng(0)
    cells = get_world(world).cells
    for _ in range(count):
        prompt = captions.draw_prompt(generator, cells)
        yield prompt, draw_scene(generator, prompt, cells, "train")


def per_cell(scene: Scene) -> tuple[list[int], list[int]]:
    values, colors = ([-1] * (scene.cells[0] * scene.cells[1]) for _ in range(2))
    for mark in scene.marks:
        assert values[mark.cell] == -1, "two digits in one cell"
        values[mark.cell], colors[mark.cell] = mark.digit, mark.color
    return values, colors


def test_handwriting_is_split_by_digit_and_never_changes():
    _, labels = scenes.strokes()
    train, test = handwriting("train"), handwriting("test")
    assert sorted(np.concatenate(train + test)) == list(range(1797))
    for digit in range(10):
        assert (labels[train[digit]] == digit).all() and (labels[test[digit]] == digit).all()
        assert len(test[digit]) == round((labels == digit).sum() / 5)
    # The split is part of every result.
    assert [rows[0] for rows in test] == FIRST_HELD_OUT


@pytest.mark.parametrize("world", WORLDS)
def test_captions_parse_back_to_their_scene(world):
    vocabulary, seen = set(captions.vocabulary()), set()
    for prompt, scene in draws(world, 3000):
        caption = write_caption(prompt)
        assert parse_caption(caption) == prompt
        words = caption.split()
        assert len(words) <= 10
        assert {word[:1] if word[0].isdigit() else word for word in words} <= vocabulary
        seen.add(prompt.category)

        values, colors = per_cell(scene)
        places = captions.arrange(prompt, scene.background, values, colors, scene.cells[1])
        assert places is not None, (caption, scene)
        assert scene.background not in [mark.color for mark in scene.marks]
        hands = [mark.handwriting for mark in scene.marks]
        assert len(set(hands)) == len(hands), "the same handwriting twice"
        assert all(mark.handwriting in handwriting("train")[mark.digit] for mark in scene.marks)
        named = {thing.color for thing in prompt.things}  # None: things without a colour share one
        assert len({mark.color for mark in scene.marks}) == len(named)
        # A lone row is filled from the left; with every colour named nothing vivid would be open.
        if scene.cells[0] == 1:
            assert None in (prompt.background, *named)
            if prompt.relation is None:
                assert [mark.cell for mark in scene.marks] == list(range(len(scene.marks)))
    assert seen == set(get_world(world).categories)


@pytest.mark.parametrize(
    ("caption", "prompt", "category"),
    [
        ("a 3", Prompt((Thing(3),)), "single_object"),
        ("a red 3", Prompt((Thing(3, RED),)), "colors"),
        ("a 3 on blue", Prompt((Thing(3),), None, BLUE), "colors"),
        ("a red 3 on blue", Prompt((Thing(3, RED),), None, BLUE), "colors"),
        ("two red 3s on green", Prompt((Thing(3, RED),) * 2, None, GREEN), "counting"),
        ("a 3 and a 7 on cyan", Prompt((Thing(3), Thing(7)), None, CYAN), "two_objects"),
        ("a 3 and a red 7", Prompt((Thing(3), Thing(7, RED))), "color_attribution"),
        ("a 3 and a red 3", Prompt((Thing(3), Thing(3, RED))), "color_attribution"),
        ("a 3 above a 7 on blue", Prompt((Thing(3), Thing(7)), "above", BLUE), "position"),
        ("a purple 0 right of a 9", Prompt((Thing(0, PURPLE), Thing(9)), "right of"), "position"),
    ],
)
def test_grammar(caption, prompt, category):
    assert parse_caption(caption) == prompt
    assert prompt.category == category
    assert write_caption(prompt) == caption


OTHER = ["", "3", "a 33", "a pink 3", "two 3", "four 3s", "a 3 and a 4 and a 5", "a 3 on", " a 3"]


@pytest.mark.parametrize("caption", [*OTHER, "a 3\n", "a 3 and a red 4 on red"])
def test_other_sentences_are_refused(caption):
    with pytest.raises(UserError) as error:
        parse_caption(caption)
    assert repr(caption) in str(error.value)


@pytest.mark.parametrize(
    ("world", "caption"),
    [("small", "two 3s"), ("small", "a 3 left of a 4"), ("full", "a 3 above a 4")],
)
def test_a_prompt_too_large_for_the_world_is_refused(world, caption):
    with pytest.raises(UserError, match=rf"'{caption}' .* 1x[12] .*'large'"):
        scenes.draw_images(world, [caption], "train", seed=0)


def test_colors_and_places_that_a_caption_leaves_open_are_uniform():
    generator = np.random.default_rng(0)
    prompt = parse_caption("a red 3 above a 7")
    drawn = [draw_scene(generator, prompt, (2, 2), "train") for _ in range(4000)]

    def shares(values, size):
        return np.bincount(values, minlength=size) / len(values)

    # Standard errors of these shares are below 0.008; tolerance 4 of them.
    backgrounds = shares([scene.background for scene in drawn], 6)
    others = shares([scene.marks[1].color for scene in drawn], 6)
    columns = shares([scene.marks[0].cell for scene in drawn], 4)
    np.testing.assert_allclose([backgrounds, others], [[0] + [0.2] * 5] * 2, atol=0.03)
    np.testing.assert_allclose(columns, [0.5, 0.5, 0, 0], atol=0.032)


@pytest.mark.parametrize("world", WORLDS)
def test_held_out_prompts_are_balanced_and_repeatable(world):
    prompts = scenes.held_out_prompts(world, 60, seed=1)
    categories = [parse_caption(prompt).category for prompt in prompts]
    names = get_world(world).categories
    assert [categories.count(name) for name in names] == [60 // len(names)] * len(names)
    assert prompts == scenes.held_out_prompts(world, 60, seed=1)
    assert prompts[:20] == scenes.held_out_prompts(world, 20, seed=1)
    assert prompts != scenes.held_out_prompts(world, 60, seed=2)


@pytest.mark.parametrize("world", ["small", pytest.param("full", marks=pytest.mark.slow)])
def test_records_are_rendered_scenes_of_their_split(data_dir, world):
    sizes, seen = get_world(world), {}
    for split in ("train", "test"):
        source = open_digits(data_dir, world, split)
        assert len(source) == getattr(sizes, split)
        seen[split] = {source[i]["image"].tobytes() for i in range(len(source))}
        for i in range(0, len(source), 10):
            record = source[i]
            cells = zip(record["digits"], record["colors"], record["handwriting"], strict=True)
            marks = tuple(Mark(i, *cell) for i, cell in enumerate(cells) if cell[0] >= 0)
            assert all(mark.handwriting in handwriting(split)[mark.digit] for mark in marks)
            scene = Scene(sizes.cells, int(record["background"]), marks)
            np.testing.assert_array_equal(record["image"], scenes.render(scene))
            prompt = parse_caption(record["caption"])
            assert record["category"] == prompt.category
            assert captions.arrange(prompt, scene.background, *per_cell(scene), sizes.cells[1])
    assert not seen["train"] & seen["test"], "an image is in both splits"


def test_a_prepared_data_set_opens_quickly_and_is_read_only(data_dir):
    open_digits(data_dir, "small", "test")
    start = time.perf_counter()
    source = open_digits(data_dir, "small", "test")
    assert time.perf_counter() - start < 1  # 2 ms measured; writing takes over a second
    with pytest.raises(ValueError, match="read-only"):
        source[0]["image"][0, 0, 0] = 0


OPEN = """
import hashlib, sys
from sprint_jax.digits.dataset import open_digits
source = open_digits(sys.argv[1], "small", "train")
digest = hashlib.sha256()
for i in range(len(source)):
    digest.update(source[i]["image"].tobytes() + source[i]["caption"].encode())
loaded = any(name.split(".")[0] in ("tensorflow", "torch") for name in sys.modules)
print(digest.hexdigest()[:16], loaded)
"""
DIGEST = "eb139b29d9eb11c5"


def test_processes_may_write_at_once_and_none_imports_tensorflow(tmp_path):
    command = [sys.executable, "-c", OPEN, str(tmp_path / "new")]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    running = [subprocess.Popen(command, **pipes) for _ in range(2)]
    for process in running:
        out, error = process.communicate(timeout=120)
        # The records never change: they are part of every result.
        assert out.splitlines()[-1].split() == [DIGEST, "False"], error
    folders = sorted(path.name for path in (tmp_path / "new/digits/small").iterdir())
    assert folders == ["2.0.0"], "remains"


def test_the_loser_of_a_race_reads_the_winners_records(tmp_path, monkeypatch):
    prepare = dataset.Digits.download_and_prepare

    def lose(self, **how):
        prepare(self, **how)
        raise OSError(39, "Directory not empty")

    monkeypatch.setattr(dataset.Digits, "download_and_prepare", lose)
    assert len(open_digits(tmp_path, "small", "test")) == 2000


def test_mistakes(tmp_path):
    with pytest.raises(UserError, match=r"'huge' .*small, full, large"):
        open_digits(tmp_path, "huge", "train")
    with pytest.raises(UserError, match="'validation'"):
        open_digits(tmp_path, "small", "validation")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"{tmp_path}/file"):
        open_digits(tmp_path / "file", "small", "train")
    broken = tmp_path / "digits/small/2.0.0"
    broken.mkdir(parents=True)
    (broken / "junk").write_text("")
    with pytest.raises(UserError, match=str(broken)):
        open_digits(tmp_path, "small", "train")
