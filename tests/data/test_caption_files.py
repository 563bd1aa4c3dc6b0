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
    read_captions,
)
from sprint_jax.data.sources.records import Caption, Rejected


@pytest.mark.parametrize(
    ("value", "captions"),
    [
        ("a cat ", [("a cat",)]),
        (None, [("",)]),
        (["a", None], [("a",), ("",)]),
        ({"caption": " a\n"}, [("a",)]),
        ({"prompt": "a", "width": 3}, [("a",)]),
        ({"text": "a", "weight": 2, "clip_score": 31}, [("a", 2.0, 31.0)]),
        ({"caption": None, "url": "x"}, []),
        ({"url": "x"}, []),
        ({"captions": []}, []),
        ({"caption": ["a", "b"]}, [("a",), ("b",)]),
        (
            {"captions": ["a", "b"], "weights": [3, 0], "scores": [31.5, None]},
            [("a", 3.0, 31.5), ("b", 0.0)],
        ),
        ({"captions": ["a", "b"], "clip_scores": [1, -2]}, [("a", 1.0, 1.0), ("b", 1.0, -2.0)]),
        (
            {"captions": [{"text": "a", "weight": 3, "score": 2}, {"caption": "b"}, "c"]},
            [("a", 3.0, 2.0), ("b",), ("c",)],
        ),
    ],
)
def test_shapes_of_json(value, captions):
    found = read_captions(parse_json(json.dumps(value).encode(), "k", "f"), "k")
    assert found == tuple(Caption(*caption) for caption in captions)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"caption": "a', "bad JSON: cat.json"),
        (b"", "bad JSON: cat.json"),
        (b'{"caption": "\xff"}', "bad JSON: cat.json: .*position 13"),
        (b"[" * 100_000, "bad JSON: cat.json"),
        (b"7", "bad caption: int"),
        (b'{"caption": {"a": 1}}', "bad caption: dict"),
        (b'[["a"]]', "bad caption: list"),
        (b'{"caption": "\\ud83d"}', "bad caption: .*surrogate"),
        (b'{"captions": ["a"], "weights": [1, 2]}', "bad caption: weights"),
        (b'{"captions": ["a"], "scores": 3}', "bad caption: scores"),
        (b'{"captions": ["a"], "weights": [null]}', "bad caption: weight None"),
        (b'{"caption": "a", "weight": -1}', "bad caption: weight -1"),
        (b'{"caption": "a", "weight": NaN}', "bad caption: weight nan"),
        (b'{"caption": "a", "weight": %s}' % (b"9" * 500), "bad caption: weight 999"),
        (b'{"caption": "a", "score": "3"}', "bad caption: score '3'"),
        (b'{"caption": "a", "score": true}', "bad caption: score True"),
    ],
)
def test_bad_json_is_refused_with_the_reason(content, reason):
    with pytest.raises(Rejected, match=f"^animals/cat: {reason}"):
        captions_beside("animals/cat", json_bytes=content)


def test_json_counts_before_text_unless_it_has_no_caption():
    assert captions_beside("k") == (Caption(""),)
    text = "\ufeff  zwei\nZeilen, 猫 \n".encode()
    assert captions_beside("k", text) == (Caption("zwei\nZeilen, 猫"),)
    assert captions_beside("k", b"a", b'{"caption": "b"}') == (Caption("b"),)
    for nothing in (b'{"url": "x"}', b'{"caption": null}', b'{"caption": ""}', b'{"captions": []}'):
        assert captions_beside("k", b"a", nothing) == (Caption("a"),)
        assert captions_beside("k", None, nothing) == (Caption(""),)
    with pytest.raises(Rejected, match=r"bad caption: .*byte 1"):
        captions_beside("k", "aü".encode("latin-1"))


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
    assert captions_beside("a/7", None, b'""', models, entry="7") == expected[1:]
    with pytest.raises(Rejected, match=r"k: .*score 'high'"):
        captions_beside("k", None, None, [("k_clip_score", {"k": {"VILA": "high"}})], entry="k")


def test_captions_survive_being_written():
    captions = (Caption('"quoted"\n猫', 0.1, None), Caption("", 0.0, -1e-9))
    assert read_captions(parse_json(dump_captions(captions), "k", "f"), "k") == captions


SCORED = (("a", 1.0, 31.0), ("b", 3.0, 29.0), ("c", 0.0, 29.0))


@pytest.mark.parametrize(
    ("captions", "temperature", "expected"),
    [
        (SCORED, 0.0, [0.25, 0.75, 0]),
        (SCORED, 0.5, np.exp([4, 0, 0]) / (np.exp(4) + 2)),
        (SCORED, 2.0, np.exp([1, 0, 0]) / (np.exp(1) + 2)),
        (SCORED, 1e-310, [1, 0, 0]),
        ((("a", 1.0), ("b", 1.0, 20.0), ("c", 1.0, 20.0)), 1.0, [0, 0.5, 0.5]),
        ((("a", 1.0), ("b", 3.0)), 1.0, [0.25, 0.75]),
        ((("a", 0.0), ("b", 0.0), ("c", 0.0)), 0.0, [1 / 3] * 3),
    ],
)
def test_captions_are_drawn_by_weight_or_by_softmax_of_the_score(captions, temperature, expected):
    captions = [Caption(*caption) for caption in captions]
    draws = [choose_caption(captions, (i + 0.5) / 2000, temperature) for i in range(2000)]
    shares = np.bincount(draws, minlength=len(captions)) / 2000
    np.testing.assert_allclose(shares, expected, atol=2e-3)


def test_no_draw_leads_past_the_end():
    last = math.nextafter(1.0, 0.0)
    assert choose_caption((Caption("a", 0.0), Caption("b", 0.0), Caption("c", 0.0)), last) == 2
    assert choose_caption((Caption("a", 1e308), Caption("b", 1e308), Caption("c", 0.0)), last) == 1
