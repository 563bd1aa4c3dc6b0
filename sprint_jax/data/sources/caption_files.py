"""Captions as they lie beside images: text, several shapes of JSON, and the files of Sana's users.

JSON is one of these, or a list of them for several captions (weights and scores are numbers, with one entry
for each caption; a score may be null)::

    "a cat"
    {"caption": "a cat"}                      or "prompt", "text", "captions"; the first that is there counts
    {"caption": "a cat", "weight": 2, "score": 31.5}
    {"captions": ["a cat", "an animal"], "weights": [3, 1], "scores": [31.5, 24.0]}
    {"captions": [{"text": "a cat", "weight": 3, "score": 31.5}, ...]}

``clip_score`` and ``clip_scores`` are other names of ``score`` and ``scores``; further keys are ignored.

Sana keeps captions of several models, and their CLIP scores, in files of their own: ``KEY_MODEL.json`` beside
an image, ``SHARD_MODEL.json`` beside ``SHARD.tar``, with ``{KEY: {MODEL: caption}}``; scores are in files whose
name ends with ``clip_score`` or ``clipscore``, with ``{KEY: {MODEL: score}}``. The caption of the image itself
is called ``prompt`` there. Sana takes the first line of a .txt file; here the whole file is one caption.
"""

import contextlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from .records import Caption, Rejected

CAPTION_KEYS = ("caption", "prompt", "text", "captions")
LARGEST = 1e300  # of weights and scores


def parse_json(data: bytes, key: str, name: object) -> Any:
    """Parses the content of the JSON file ``name``; raises `Rejected` if it is no JSON, or no Unicode."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Rejected(key, f"bad JSON: {name}: {error}") from error


def read_captions(value: Any, key: str) -> tuple[Caption, ...]:
    """Reads the captions in a JSON value, in its order, texts stripped; none where it has no caption.

    Raises `Rejected` for a value of another shape than the module describes, or a negative weight.
    """
    if not isinstance(value, Mapping):
        items = value if isinstance(value, list) else [value]
        return tuple(_read_one(item, key) for item in items)
    found = _find_caption(value)
    if found is None:
        return ()
    if not isinstance(found, list):
        return (_read_one(value, key),)
    numbers = {
        "weight": value.get("weights"),
        "score": value.get("scores", value.get("clip_scores")),
    }
    numbers = {name: values for name, values in numbers.items() if values is not None}
    for name, values in numbers.items():
        if not isinstance(values, list) or len(values) != len(found):
            raise Rejected(key, f"bad caption: {name}s must be a list of {len(found)} numbers")
    captions = []
    for k, item in enumerate(found):
        fields = item if isinstance(item, Mapping) else {"text": item}
        mine = {name: values[k] for name, values in numbers.items()}
        captions.append(_read_one({**fields, **mine}, key))
    return tuple(captions)


def captions_beside(
    key: str,
    text: bytes | None = None,
    json_bytes: bytes | None = None,
    models: Iterable[tuple[str, Any]] = (),
    entry: str = "",
) -> tuple[Caption, ...]:
    """Reads all captions of an image, at least one: ``''`` where there is none.

    Args:
      key: of the image, for errors.
      text: content of its .txt file, which counts where the JSON file has no caption.
      json_bytes: content of its .json file.
      models: name without .json, and value, of Sana's files; their captions are added. Their score of
        ``prompt`` is that of an only caption before these.
      entry: the image's name in them.

    Raises `Rejected` for a file that is not as the module describes.
    """
    own = ()
    if json_bytes is not None:
        own = read_captions(parse_json(json_bytes, key, f"{key.rpartition('/')[2]}.json"), key)
    if not any(caption.text for caption in own):
        written = _parse_text(text or b"", key)
        own = (Caption(written),) if written else ()
    texts, scores = {}, {}
    for stem, value in models:
        entries = value.get(entry) if isinstance(value, Mapping) else None
        if not isinstance(entries, Mapping):
            continue  # it is about something else
        if stem.endswith(("clip_score", "clipscore")):
            scores |= {name: _read_score(score, key) for name, score in entries.items()}
        else:
            texts |= {name: _text(t, key) for name, t in entries.items() if isinstance(t, str)}
    if len(own) == 1 and own[0].score is None:
        own = (own[0]._replace(score=scores.get("prompt")),)
    added = (Caption(text, 1.0, scores.get(model)) for model, text in texts.items() if text)
    return (*own, *added) or (Caption(""),)


def choose_caption(captions: Sequence[Caption], u: float, temperature: float = 0.0) -> int:
    """Returns the number of the caption that a uniform draw ``u`` in [0, 1) chooses.

    With ``temperature`` 0, or where no caption has a score, by weight. Above 0, of those with a score, by
    softmax(score / temperature) whatever their weights; scores keep the scale they came with, such as 31.5.
    (So the SANA paper, arXiv 2410.10629; its code has score ** (1 / temperature) instead.) Weights that
    are all 0 are equal.
    """
    scores = np.array([math.nan if c.score is None else c.score for c in captions], np.float64)
    known = ~np.isnan(scores)
    if temperature > 0 and known.any():
        with np.errstate(over="ignore"):  # of a tiny temperature: exp(-inf) is the 0 that it means
            shares = np.where(known, np.exp((scores - scores[known].max()) / temperature), 0.0)
    else:
        shares = np.array([caption.weight for caption in captions], np.float64)
        shares = shares / shares.max() if shares.max() > 0 else np.ones(len(captions))
    ends = np.cumsum(shares)
    index = int(np.searchsorted(ends, u * ends[-1], side="right"))
    return min(index, int(np.flatnonzero(shares)[-1]))  # rounding may lead past the end


def dump_captions(captions: Sequence[Caption]) -> bytes:
    """Writes JSON that `read_captions` reads back: UTF-8."""
    items = [caption._asdict() for caption in captions]
    return json.dumps(items, ensure_ascii=False, allow_nan=False).encode()


def _parse_text(data: bytes, key: str) -> str:
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise Rejected(key, f"bad caption: not UTF-8 at byte {error.start}") from error


def _find_caption(value: Mapping[str, Any]) -> Any:
    return next((value[name] for name in CAPTION_KEYS if name in value), None)


def _read_one(value: Any, key: str) -> Caption:
    """One caption: a text, null for the empty one, or an object."""
    if not isinstance(value, Mapping):
        return Caption(_text(value, key))
    score = value.get("score", value.get("clip_score"))
    return Caption(
        _text(_find_caption(value), key),
        _number(value.get("weight", 1.0), "weight", key),
        None if score is None else _number(score, "score", key),
    )


def _text(value: Any, key: str) -> str:
    if value is not None and not isinstance(value, str):
        raise Rejected(key, f"bad caption: {type(value).__name__} instead of a text")
    text = (value or "").strip()
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Rejected(key, "bad caption: half of a surrogate pair") from error
    return text


def _number(value: Any, name: str, key: str) -> float:
    lowest = 0 if name == "weight" else -LARGEST
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not lowest <= value <= LARGEST:
        raise Rejected(key, f"bad caption: {name} {value!r} is no number, negative or not finite")
    return float(value)


def _read_score(value: Any, key: str) -> float:
    """Reads a CLIP score of Sana's files, which have text or numbers."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)
    return _number(value, "score", key)
