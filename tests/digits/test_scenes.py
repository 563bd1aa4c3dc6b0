"""The digits world: captions, scenes, and the TFDS data set."""

import subprocess
import sys
import time

import numpy as np
import pytest

from sprint_jax.core.errors import UserError
from sprint_jax.digits import captions
from sprint_jax.digits import scenes as digits
from sprint_jax.digits.captions import Prompt, Thing, parse_caption, write_caption

RED, GREEN, BLUE, YELLOW, PURPLE, CYAN = range(6)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("digits")


def draws(world: str, count: int, split: str = "train"):
    generator = np.random.default_rng(0)
    cells = digits.get_world(world).cells
    for _ in range(count):
        prompt = captions.draw_prompt(generator, cells)
        yield prompt, digits.draw_scene(generator, prompt, cells, split)


def per_cell(scene: digits.Scene) -> tuple[list[int], list[int]]:
    values, colors = ([-1] * (scene.cells[0] * scene.cells[1]) for _ in range(2))
    for mark in scene.marks:
        assert values[mark.cell] == -1, "two digits in one cell"
        values[mark.cell], colors[mark.cell] = mark.digit, mark.color
    return values, colors


def test_handwriting_is_parted_by_digit_for_ever():
    _, labels = digits.strokes()
    train, test = digits.handwriting("train"), digits.handwriting("test")
    assert sorted(np.concatenate(train + test)) == list(range(1797))
    for digit in range(10):
        assert (labels[train[digit]] == digit).all() and (labels[test[digit]] == digit).all()
        assert len(test[digit]) == round((labels == digit).sum() / 5)
    # The split is part of every result: a change of it must not go unseen.
    assert [rows[0] for rows in test] == FIRST_HELD_OUT


FIRST_HELD_OUT = [536, 70, 851, 143, 613, 495, 1222, 182, 1583, 895]


@pytest.mark.parametrize("world", list(digits.WORLDS))
def test_captions_parse_back_to_their_scene(world):
    vocabulary = set(captions.vocabulary())
    seen = set()
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
        said = {thing.color for thing in prompt.things}  # None: those not said share one
        assert len({mark.color for mark in scene.marks}) == len(said)
        for mark in scene.marks:
            assert mark.handwriting in digits.handwriting("train")[mark.digit]
    assert seen == set(digits.get_world(world).categories)


def test_every_caption_leaves_a_color_or_a_place_to_chance():
    for world in ("small", "full"):
        for prompt, _ in draws(world, 2000):
            assert None in (prompt.background, *(thing.color for thing in prompt.things))
    # In the large world even the most specific captions leave a row or a column open.
    generator = np.random.default_rng(0)
    whole = parse_caption("a red 3 left of a green 7 on blue")
    rows = [digits.draw_scene(generator, whole, (2, 2), "train").marks[0].cell for _ in range(50)]
    assert set(rows) == {0, 2}


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
        (
            "a purple 0 right of a yellow 9",
            Prompt((Thing(0, PURPLE), Thing(9, YELLOW)), "right of"),
            "position",
        ),
    ],
)
def test_grammar(caption, prompt, category):
    assert parse_caption(caption) == prompt
    assert prompt.category == category
    assert write_caption(prompt) == caption


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "3",
        "a 33",
        "a pink 3",
        "two 3",
        "four 3s",
        "a 3 and a 4 and a 5",
        "a 3 on",
        " a 3",
        "a 3\n",
    ],
)
def test_other_sentences_are_refused(caption):
    with pytest.raises(UserError, match="not of the digits world"):
        parse_caption(caption)


def test_a_digit_in_the_color_of_its_background_is_refused():
    with pytest.raises(UserError, match="'a 3 and a red 4 on red' hides a digit"):
        parse_caption("a 3 and a red 4 on red")


@pytest.mark.parametrize(
    ("world", "caption"),
    [("small", "two 3s"), ("small", "a 3 left of a 4"), ("full", "a 3 above a 4")],
)
def test_a_prompt_too_large_for_the_world_is_refused(world, caption):
    with pytest.raises(UserError, match=r"does not fit in 1x[12] cells: use the world 'large'"):
        digits.draw_images(world, [caption], "train", seed=0)


def test_what_a_caption_leaves_open_is_uniform():
    generator = np.random.default_rng(0)
    prompt = parse_caption("a red 3 above a 7")
    scenes = [digits.draw_scene(generator, prompt, (2, 2), "train") for _ in range(4000)]

    def shares(values, size):
        return np.bincount(values, minlength=size) / len(values)

    # Standard errors of these shares are below 0.008; tolerance 4 of them.
    backgrounds = shares([scene.background for scene in scenes], 6)
    others = shares([scene.marks[1].color for scene in scenes], 6)
    columns = shares([scene.marks[0].cell for scene in scenes], 4)
    np.testing.assert_allclose(backgrounds, [0, 0.2, 0.2, 0.2, 0.2, 0.2], atol=0.03)
    np.testing.assert_allclose(others, [0, 0.2, 0.2, 0.2, 0.2, 0.2], atol=0.03)
    np.testing.assert_allclose(columns, [0.5, 0.5, 0, 0], atol=0.032)


def test_in_a_single_row_things_stand_from_the_left():
    for prompt, scene in draws("full", 500):
        if prompt.relation is None:
            assert [mark.cell for mark in scene.marks] == list(range(len(prompt.things)))


def test_render_mixes_by_ink():
    ink, _ = digits.strokes()
    scene = digits.Scene((2, 2), BLUE, (digits.Mark(1, 3, YELLOW, 3),))
    image = digits.render(scene)
    assert image.shape == (16, 16, 3) and image.dtype == np.uint8
    expected = np.tile(np.uint8([0, 0, 255]), (16, 16, 1))
    share = ink[3].astype(np.float64)
    expected[:8, 8:] = np.rint(255 * np.stack([share, share, 1 - share], -1))
    np.testing.assert_array_equal(image, expected)
    assert digits.to_float(np.uint8([0, 255])).tolist() == [-1, 1]


def test_held_out_prompts_are_balanced_and_repeatable():
    for world in digits.WORLDS:
        prompts = digits.held_out_prompts(world, 60, seed=1)
        categories = [parse_caption(prompt).category for prompt in prompts]
        names = digits.get_world(world).categories
        assert [categories.count(name) for name in names] == [60 // len(names)] * len(names)
        assert prompts == digits.held_out_prompts(world, 60, seed=1)
        assert prompts[:20] == digits.held_out_prompts(world, 20, seed=1)
        assert prompts != digits.held_out_prompts(world, 60, seed=2)


@pytest.mark.parametrize("world", ["small", "full"])
def test_records_are_rendered_scenes_of_their_split(data_dir, world):
    sizes = digits.get_world(world)
    seen = {}
    for split in ("train", "test"):
        source = digits.open_digits(data_dir, world, split)
        assert len(source) == getattr(sizes, split)
        pools = digits.handwriting(split)
        seen[split] = {source[i]["image"].tobytes() for i in range(len(source))}
        for i in range(0, len(source), 10):
            record = source[i]
            marks = [
                digits.Mark(cell, digit, color, hand)
                for cell, (digit, color, hand) in enumerate(
                    zip(record["digits"], record["colors"], record["handwriting"], strict=True)
                )
                if digit >= 0
            ]
            assert all(mark.handwriting in pools[mark.digit] for mark in marks)
            scene = digits.Scene(sizes.cells, int(record["background"]), tuple(marks))
            np.testing.assert_array_equal(record["image"], digits.render(scene))
            prompt = parse_caption(record["caption"])
            assert record["category"] == prompt.category
            assert captions.arrange(prompt, scene.background, *per_cell(scene), sizes.cells[1])
    assert not seen["train"] & seen["test"], "an image is in both splits"


def test_a_prepared_data_set_opens_quickly_and_cannot_be_changed_by_accident(data_dir):
    digits.open_digits(data_dir, "small", "test")
    start = time.perf_counter()
    source = digits.open_digits(data_dir, "small", "test")
    assert time.perf_counter() - start < 1  # 2 ms measured; writing takes over a second
    with pytest.raises(ValueError, match="read-only"):
        source[0]["image"][0, 0, 0] = 0


def test_plain_tfds_gives_random_access(data_dir):
    mine = digits.open_digits(data_dir, "small", "train")
    builder = digits.Digits(data_dir=data_dir, config="small", file_format="array_record")
    theirs = builder.as_data_source("train")
    for index in (9999, 0, 4321):
        assert theirs[index]["caption"].decode() == mine[index]["caption"]
        np.testing.assert_array_equal(theirs[index]["image"], mine[index]["image"])


OPEN_TWICE = """
import hashlib, sys
from sprint_jax.digits.scenes import open_digits
source = open_digits(sys.argv[1], "small", "train")
digest = hashlib.sha256()
for i in range(len(source)):
    digest.update(source[i]["image"].tobytes() + source[i]["caption"].encode())
loaded = any(name.split(".")[0] in ("tensorflow", "torch") for name in sys.modules)
print(digest.hexdigest(), loaded)
"""


def test_processes_may_write_at_once_and_none_imports_tensorflow(tmp_path):
    command = [sys.executable, "-c", OPEN_TWICE, str(tmp_path / "new")]
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    answers = []
    for process in running:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        answers.append(out.splitlines()[-1].split())
    assert answers[0] == answers[1] and answers[0][1] == "False"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["digits"], "remains"


def test_the_loser_of_a_race_reads_the_winner_s_records(tmp_path):
    digits.open_digits(tmp_path, "small", "test")
    before = (tmp_path / "digits/small/2.0.0").stat().st_ino
    digits._prepare(tmp_path, "small")  # another process has finished meanwhile
    assert (tmp_path / "digits/small/2.0.0").stat().st_ino == before
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


def test_errors_of_users(tmp_path):
    with pytest.raises(
        UserError, match="world 'huge' is unknown: choose one of small, full, large"
    ):
        digits.open_digits(tmp_path, "huge", "train")
    with pytest.raises(UserError, match="split 'validation' is unknown"):
        digits.open_digits(tmp_path, "small", "validation")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write the digits to .*file"):
        digits.open_digits(tmp_path / "file", "small", "train")
    broken = tmp_path / "digits/small/2.0.0"
    broken.mkdir(parents=True)
    (broken / "junk").write_text("")
    with pytest.raises(UserError, match=r"2\.0\.0 is not a whole data set: delete it"):
        digits.open_digits(tmp_path, "small", "train")
