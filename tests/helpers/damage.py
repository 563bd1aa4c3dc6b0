"""Damage to bytes, JSON and command lines, drawn from a `random.Random`."""

import contextlib
import copy
import json
import random
from collections.abc import Iterator
from typing import Any

PLAIN = (
    "-1 0 1 nan inf -inf 1e400 99999999999999999999 true none 1,2 , [ () \\ %s {} - -- = a=b 猫 "
)
PLAIN += (
    "gs://bucket/x s3://b http://x/y file:///x .. . /proc/x /dev/null tfds: tfds:x:y org/model "
)
PLAIN += "configs/digits.py bfloat16 8x8"
WORDS = [*PLAIN.split(), "", "two words", "\u202e", "\udcff", "x" * 300, "9" * 5000]
VALUES = [None, True, False, 0, -1, 1, 3, 0.5, -0.5, 1e308, 10**9, 2**31, 2**63, 10**30, 10**400]
VALUES += [
    float("nan"),
    float("inf"),
    [],
    {},
    [None],
    [[1]],
    [1, 2],
    {"a": 1},
    {"a.b": 1},
    "\ud800",
]
VALUES += [
    "",
    "x",
    "x" * 10_000,
    ["x"] * 100,
    "../x",
    "/dev/zero",
    "none",
    "1.3",
    "float32",
    "gs://b",
]


def pick(case: random.Random, values: list) -> Any:
    return copy.deepcopy(values[case.randrange(len(values))])


def damage_bytes(case: random.Random, data: bytes, head: int | None = None) -> bytes:
    """Some bytes flipped, cut, repeated, or put in; mostly among the first ``head``."""
    data = bytearray(data)
    for _ in range(case.choice((1, 1, 2, 8))):
        at = case.randrange(min(len(data), head or len(data)) + 1)
        what = case.randrange(5)
        if what == 0 and at < len(data):
            data[at] ^= 1 << case.randrange(8)
        elif what == 1 and at < len(data):
            data[at] = case.choice((0, 0xFF, 0x7F, case.randrange(256)))
        elif what == 2:
            data = data[:at]
        elif what == 3:
            data[at:at] = case.randbytes(case.choice((1, 4, 512)))
        else:
            data[at:at] = data[at : at + case.choice((1, 8, 512))]
    return bytes(data)


def damage_json(case: random.Random, text: str) -> bytes:
    """JSON with other values, keys that are gone or new, deep lists; or no JSON."""
    if case.random() < 0.15:
        whole = [
            b"",
            b"null",
            b"[]",
            b"3",
            b'"x"',
            b"{}",
            b"[" * 100_000,
            b'{"a":' * 50_000,
            b"NaN",
        ]
        whole += [
            text.encode("utf-16"),
            b"\xff\xfe",
            text[: len(text) // 2].encode(),
            b"9" * 10_000,
        ]
        return pick(case, whole)
    value = json.loads(text)
    for _ in range(case.choice((1, 1, 1, 2, 5))):
        places = list(_places(value))
        if not places:
            break
        container, key = pick_place(case, places)
        what = case.randrange(10)
        if what == 0:
            del container[key]
        elif what == 1 and isinstance(container, dict):
            container[pick(case, WORDS)] = pick(case, VALUES)
        elif what == 2:
            container[key] = [container[key]]
        elif what == 3:
            other, there = pick_place(case, places)
            with contextlib.suppress(KeyError, IndexError):  # what was deleted or replaced before
                container[key] = copy.deepcopy(other[there])
        else:
            container[key] = pick(case, VALUES)
    return json.dumps(value).encode()


def pick_place(case: random.Random, places: list) -> tuple:
    return places[case.randrange(len(places))]  # the container itself, no copy


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of nested dicts and lists, of long ones the first few."""
    keys = list(value) if isinstance(value, dict) else range(len(value))
    for key in list(keys)[:200] if isinstance(value, dict | list) else ():
        yield value, key
        if isinstance(value[key], dict | list) and value[key]:
            yield from _places(value[key])


def damage_words(case: random.Random, words: list[str], keys: list[str]) -> list[str]:
    """A command line with words that are other, gone, new or twice there, and settings of config ``keys``."""
    words = list(words)
    for _ in range(case.choice((1, 1, 2, 3))):
        at, what, word = case.randrange(len(words) + 1), case.randrange(6), pick(case, WORDS)
        if what == 0:
            words[at:at] = [word]
        elif what == 1:
            words[at : at + 1] = []
        elif what == 2:
            words[at:at] = words[at : at + 1]
        elif what == 3 and at < len(words):
            words[at] = words[at].partition("=")[0] + "=" + word
        elif what == 4:
            words += [f"--config.{case.choice(keys)}={word}"]
        elif at < len(words):
            words[at] = word
    return words
