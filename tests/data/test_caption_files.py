"""Captions beside images: shapes of files, what is refused, and how one is drawn."""

import json
import math

import numpy as np
import pytest

from sprint_jax.data.sources.caption_files import (
    captions_beside,
    choose_caption,
    dump_captions,
    parse_json,
    parse_text,
    read_captions,
)
from sprint_jax.data.sources.records import Caption, Rejected


@pytest.mark.parametrize(
    ("value", "captions"),
    [
        ("a cat ", [Caption("a cat")]),
        (None, [Caption("")]),
        (["a", None], [Caption("a"), Caption("")]),
        ({"caption": " a\n"}, [Caption("a")]),
        ({"prompt": "a", "width": 3}, [Caption("a")]),
        ({"text": "a", "weight": 2, "clip_score": 31}, [Caption("a", 2.0, 31.0)]),
        ({"caption": None, "url": "x"}, []),
        ({"url": "x"}, []),
        ({"captions": []}, []),
        ({"caption": ["a", "b"]}, [Caption("a"), Caption("b")]),
        (
            {"captions": ["a", "b"], "weights": [3, 0], "scores": [31.5, None]},
            [Caption("a", 3.0, 31.5), Caption("b", 0.0)],
        ),
        (
            {"captions": ["a", "b"], "clip_scores": [1, -2]},
            [Caption("a", 1.0, 1.0), Caption("b", 1.0, -2.0)],
        ),
        (
            {"captions": [{"text": "a", "weight": 3, "score": 2}, {"caption": "b"}, "c"]},
            [Caption("a", 3.0, 2.0), Caption("b"), Caption("c")],
        ),
    ],
)
def test_shapes_of_json(value, captions):
    assert list(read_captions(parse_json(json.dumps(value).encode(), "k", "f"), "k")) == captions


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"caption": "a', "bad JSON: cat.json: Unterminated string"),
        (b"", "bad JSON: cat.json: Expecting value"),
        (b'{"caption": "\xff"}', "bad JSON: cat.json is not UTF-8 at byte 13"),
        (b"[" * 100_000, "bad JSON: cat.json: "),
        (b"7", "bad caption: int instead of a text"),
        (b'{"caption": {"a": 1}}', "bad caption: dict instead of a text"),
        (b'[["a"]]', "bad caption: list instead of a text"),
        (b'{"caption": "\\ud83d"}', "bad caption: half of a surrogate pair"),
        (b'{"captions": ["a"], "weights": [1, 2]}', "bad caption: weights must be a list of 1"),
        (b'{"captions": ["a"], "scores": 3}', "bad caption: scores must be a list of 1"),
        (b'{"captions": ["a"], "weights": [null]}', "bad caption: weight None is not a number"),
        (b'{"caption": "a", "weight": -1}', "bad caption: weight -1 is negative"),
        (b'{"caption": "a", "weight": NaN}', "bad caption: weight nan is not finite"),
        (b'{"caption": "a", "weight": %s}' % (b"9" * 5000), "bad caption: weight inf is not"),
        (b'{"caption": "a", "score": "3"}', "bad caption: score '3' is not a number"),
        (b'{"caption": "a", "score": true}', "bad caption: score True is not a number"),
    ],
)
def test_bad_json_is_refused_with_the_reason(content, reason):
    with pytest.raises(Rejected) as caught:
        captions_beside("animals/cat", json_bytes=content)
    assert caught.value.key == "animals/cat" and caught.value.reason.startswith(reason)


def test_a_text_file_is_one_caption_and_must_be_utf8():
    assert parse_text("\ufeff  zwei\nZeilen, 猫 \n".encode(), "k") == "zwei\nZeilen, 猫"
    assert parse_text(b"", "k") == ""
    with pytest.raises(Rejected, match="bad caption: not UTF-8 at byte 1"):
        parse_text("aü".encode("latin-1"), "k")


def test_json_counts_before_text_unless_it_says_nothing():
    assert captions_beside("k") == (Caption(""),)
    assert captions_beside("k", b"a") == (Caption("a"),)
    assert captions_beside("k", b"a", b'{"caption": "b"}') == (Caption("b"),)
    for nothing in (b'{"url": "x"}', b'{"caption": null}', b'{"caption": ""}', b'{"captions": []}'):
        assert captions_beside("k", b"a", nothing) == (Caption("a"),)
        assert captions_beside("k", None, nothing) == (Caption(""),)


def test_files_of_sana_add_captions_and_scores():
    models = [
        ("7_VILA", {"7": {"VILA": "longer"}, "8": {"VILA": "not this"}}),
        ("7_VILA_clip_score", {"7": {"VILA": "27.5"}}),
        ("7_InternVL2-26B", {"7": {"InternVL2-26B": "longest", "height": 3}}),
        ("7_prompt_clipscore", {"7": {"prompt": 21}}),
        ("7_boxes", [1, 2]),
    ]
    expected = (Caption("short", 1.0, 21.0), Caption("longer", 1.0, 27.5), Caption("longest"))
    assert captions_beside("a/7", b"short", None, models, entry="7") == expected
    assert captions_beside("a/7", None, None, models, entry="7") == expected[1:]
    with pytest.raises(Rejected, match="CLIP score could not convert"):
        captions_beside("k", None, None, [("k_clip_score", {"k": {"VILA": "high"}})], entry="k")


def test_captions_survive_being_written():
    captions = (Caption('"quoted"\n猫', 0.1, None), Caption("", 0.0, -1e-9))
    assert read_captions(parse_json(dump_captions(captions), "k", "f"), "k") == captions


def share(captions, temperature=0.0, draws=4000):
    chosen = [choose_caption(captions, (i + 0.5) / draws, temperature) for i in range(draws)]
    return np.bincount(chosen, minlength=len(captions)) / draws


def test_captions_are_drawn_by_weight_or_by_softmax_of_the_score():
    captions = (Caption("a", 1.0, 31.0), Caption("b", 3.0, 29.0), Caption("c", 0.0, 29.0))
    np.testing.assert_allclose(share(captions), [0.25, 0.75, 0], atol=1e-3)
    for temperature in (0.5, 2.0, 1000.0):
        powers = np.exp(np.array([31.0, 29.0, 29.0]) / temperature - 31.0 / temperature)
        np.testing.assert_allclose(share(captions, temperature), powers / powers.sum(), atol=1e-3)
    assert share(captions, 1e-310).tolist() == [1, 0, 0]


def test_captions_without_a_score_are_not_drawn_by_score_unless_none_has_one():
    captions = (Caption("a", 1.0), Caption("b", 1.0, 20.0), Caption("c", 1.0, 20.0))
    np.testing.assert_allclose(share(captions, 1.0), [0, 0.5, 0.5], atol=1e-3)
    captions = (Caption("a", 1.0), Caption("b", 3.0))
    np.testing.assert_allclose(share(captions, 1.0), [0.25, 0.75], atol=1e-3)


def test_weights_that_are_all_zero_are_equal_and_no_draw_leads_past_the_end():
    captions = (Caption("a", 0.0), Caption("b", 0.0), Caption("c", 0.0))
    np.testing.assert_allclose(share(captions), [1 / 3] * 3, atol=1e-3)
    last = math.nextafter(1.0, 0.0)
    assert choose_caption(captions, last) == 2
    assert choose_caption((Caption("a", 1e308), Caption("b", 1e308), Caption("c", 0.0)), last) == 1
    assert choose_caption((Caption("a"),), 0.0) == 0
