"""Captions as they lie beside images: text, several shapes of JSON, and the files of Sana's users.

JSON is one of these, or a list of them for several captions (weights and scores are numbers, with one entry
for each caption; a score may be null)::

    "a cat"
    {"caption": "a cat"}                      or "prompt", "text", "captions"; the first that is there counts
    {"caption": "a cat", "weight": 2, "score": 31.5}
    {"captions": ["a cat", "an animal"], "weights": [3, 1], "scores": [31.5, 24.0]}
    {"captions": [{"text": "a cat", "weight": 3, "score": 31.5}, ...]}

``clip_score`` and ``clip_scores`` are other names of ``score`` and ``scores``; further keys are left alone.

Sana keeps captions of several models, and their CLIP scores, in files of their own: ``KEY_MODEL.json`` beside
an image, ``SHARD_MODEL.json`` beside ``SHARD.tar``, with ``{KEY: {MODEL: caption}}``; scores are in files whose
name ends with ``clip_score`` or ``clipscore``, with ``{KEY: {MODEL: score}}``. The caption of the image itself
is called ``prompt`` there. (Sana wants these names in its config; here all that lie there are read. It takes
the first line of a .txt file; here the whole file is one caption.)
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from .records import Caption, Rejected

CAPTION_KEYS = ("caption", "prompt", "text", "captions")


def parse_text(data: bytes, key: str) -> str:
    """The content of a .txt file as one caption, without white space around it.

    Raises:
      Rejected: not UTF-8.
    """
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise Rejected(key, f"bad caption: not UTF-8 at byte {error.start}") from error


def parse_json(data: bytes, key: str, name: str) -> Any:
    """The content of a JSON file; ``name`` is that of the file.

    Raises:
      Rejected: not UTF-8, or not JSON.
    """
    try:
        # A whole number too large for a float becomes infinite, as one with a decimal point does.
        return json.loads(data.decode("utf-8-sig"), parse_int=_integer)
    except UnicodeDecodeError as error:
        raise Rejected(key, f"bad JSON: {name} is not UTF-8 at byte {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise Rejected(key, f"bad JSON: {name}: {error}") from error


def read_captions(value: Any, key: str) -> tuple[Caption, ...]:
    """The captions that a JSON value says, in its order, texts stripped; none where it has no caption.

    Raises:
      Rejected: a value of another shape than the module describes, or a negative weight.
    """
    if isinstance(value, list):
        return tuple(_read_one(item, key) for item in value)
    said = _said(value) if isinstance(value, Mapping) else value
    if isinstance(said, list):
        return _with_numbers(tuple(_read_one(item, key) for item in said), value, key)
    if isinstance(value, Mapping) and said is None:
        return ()
    return (_read_one(value, key),)


def model_entries(value: Any, entry: str, key: str, *, scores: bool) -> dict[str, Any]:
    """What one of Sana's files says in an entry: model -> caption, or model -> score.

    Nothing where the file has no such entry: it may be about something else.

    Raises:
      Rejected: a score that is not a number.
    """
    entries = value.get(entry) if isinstance(value, Mapping) else None
    if not isinstance(entries, Mapping):
        return {}
    if not scores:
        return {name: _text(text, key) for name, text in entries.items() if isinstance(text, str)}
    try:
        return {name: _number(float(score), "score", key) for name, score in entries.items()}
    except (TypeError, ValueError) as error:
        raise Rejected(key, f"bad caption: CLIP score {error}") from error


def holds_scores(stem: str) -> bool:
    """Whether one of Sana's files has scores, by its name without .json."""
    return stem.endswith(("clip_score", "clipscore"))


def captions_beside(
    key: str,
    text: bytes | None = None,
    json_bytes: bytes | None = None,
    models: Iterable[tuple[str, Any]] = (),
    entry: str = "",
) -> tuple[Caption, ...]:
    """All captions of an image, at least one: ``''`` where there is none.

    Args:
      key: of the image.
      text: content of its .txt file, which counts where the JSON file says nothing.
      json_bytes: content of its .json file.
      models: name without .json, and value, of Sana's files; their captions are added. What they say of
        ``prompt`` is the score of an only caption before these.
      entry: what they call the image.

    Raises:
      Rejected: a file that is not as the module describes.
    """
    name = key.rpartition("/")[2]
    own = (
        ()
        if json_bytes is None
        else read_captions(parse_json(json_bytes, key, f"{name}.json"), key)
    )
    if not any(caption.text for caption in own):
        written = "" if text is None else parse_text(text, key)
        own = (Caption(written),) if written else ()
    texts, scores = {}, {}
    for stem, value in models:
        (scores if holds_scores(stem) else texts).update(
            model_entries(value, entry, key, scores=holds_scores(stem))
        )
    if len(own) == 1 and own[0].score is None:
        own = (own[0]._replace(score=scores.get("prompt")),)
    added = (Caption(text, 1.0, scores.get(model)) for model, text in texts.items() if text)
    return (*own, *added) or (Caption(""),)


def choose_caption(captions: Sequence[Caption], u: float, temperature: float = 0.0) -> int:
    """The number of the caption that a uniform draw chooses.

    With ``temperature`` 0, or where no caption has a score, by weight. Above 0, of those with a score, by
    softmax(score / temperature) whatever their weights; scores keep the scale they came with, such as 31.5.
    (So the SANA paper, arXiv 2410.10629; its code has score ** (1 / temperature) instead.) Weights that
    are all 0 are equal.

    Args:
      captions: at least one.
      u: in [0, 1).
      temperature: at least 0, in the units of the scores.
    """
    scores = np.array([math.nan if c.score is None else c.score for c in captions], np.float64)
    known = ~np.isnan(scores)
    if temperature > 0 and known.any():
        with np.errstate(over="ignore"):  # of a tiny temperature: exp(-inf) is the 0 that it means
            shares = np.where(known, np.exp((scores - scores[known].max()) / temperature), 0.0)
    else:
        shares = np.array([caption.weight for caption in captions], np.float64)
        if shares.max() > 0:
            shares = shares / shares.max()
        else:
            shares = np.ones(len(captions))
    ends = np.cumsum(shares)
    index = int(np.searchsorted(ends, u * ends[-1], side="right"))
    return min(index, int(np.flatnonzero(shares)[-1]))  # rounding may lead past the end


def dump_captions(captions: Sequence[Caption]) -> bytes:
    """JSON that `read_captions` reads back: UTF-8."""
    items = [{"text": c.text, "weight": c.weight, "score": c.score} for c in captions]
    return json.dumps(items, ensure_ascii=False, allow_nan=False).encode()


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) < 300 else float(digits)


def _said(value: Mapping[str, Any]) -> Any:
    return next((value[name] for name in CAPTION_KEYS if name in value), None)


def _read_one(value: Any, key: str) -> Caption:
    """One caption: a text, null for the empty one, or an object."""
    if not isinstance(value, Mapping):
        return Caption(_text(value, key))
    score = value.get("score", value.get("clip_score"))
    return Caption(
        _text(_said(value), key),
        _number(value.get("weight", 1.0), "weight", key),
        None if score is None else _number(score, "score", key),
    )


def _with_numbers(
    captions: tuple[Caption, ...], value: Mapping[str, Any], key: str
) -> tuple[Caption, ...]:
    for field, name in (("weight", "weights"), ("score", "scores"), ("score", "clip_scores")):
        if name not in value:
            continue
        numbers = value[name]
        if not isinstance(numbers, list) or len(numbers) != len(captions):
            raise Rejected(key, f"bad caption: {name} must be a list of {len(captions)} numbers")
        captions = tuple(
            caption
            if number is None and field == "score"
            else caption._replace(**{field: _number(number, field, key)})
            for caption, number in zip(captions, numbers, strict=True)
        )
    return captions


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
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Rejected(key, f"bad caption: {name} {value!r} is not a number")
    if not math.isfinite(value):
        raise Rejected(key, f"bad caption: {name} {value!r} is not finite")
    if name == "weight" and value < 0:
        raise Rejected(key, f"bad caption: weight {value!r} is negative")
    return float(value)
