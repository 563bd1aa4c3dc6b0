"""GenEval: whether the things, counts, colours and places of a prompt are in its picture, by detected boxes.

A detector is a function from a picture to `Detection` rows by class; this project has none for photographs.
Boxes come from GenEval's own ``results.jsonl`` (`read_results`), or from an exact reader of a drawn world.
Source: Ghosh et al., arXiv 2310.11513 (djghosh13/geneval, evaluation/).
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ..core.errors import UserError
from ..core.files import read_text
from ..core.storage import AnyPath
from .clip_score import mean_with_error
from .geneval_prompts import COLORS, TAGS, Request

THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9  # of confidence, which must be larger
MOST = 16  # things of a class
MARGIN = 0.1  # of the sizes of two things, by which their centres must differ
GREY = "#999"  # around a thing whose colour is asked for


class Detection(NamedTuple):
    """A thing that was found: left, top, right, bottom in pixels, confidence, bool mask [H, W] or None."""

    box: tuple[float, float, float, float]
    score: float
    mask: np.ndarray | None = None


class Verdict(NamedTuple):
    """Whether a picture is right, and what is wrong: kind, class, what was found."""

    correct: bool
    faults: tuple[tuple, ...] = ()


Things = Mapping[str, Sequence[Detection]]
Colors = Callable[[str, Sequence[Detection]], list[str]]


def select(things: Things, tag: str) -> dict[str, list[Detection]]:
    """Keeps, of each class, up to `MOST` things that are confident enough, the most confident first."""
    limit = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    kept = {}
    for name, found in things.items():
        order = np.argsort([each.score for each in found])[::-1]
        rows = [found[i] for i in order if found[i].score > limit][:MOST]
        if rows:
            kept[name] = rows
    return kept


def judge(request: Request, things: Things, colors: Colors) -> Verdict:
    """Applies GenEval's rules to the things of `select`.

    Of each class that must be seen only the first ``count`` things are looked at. A colour must be that of
    all of them; a relation must hold between each of them and each thing of the earlier entry.

    Args:
      colors: ``colors(class, things)``, the colour of each of some things.
    """
    faults, groups = [], []
    for need in request.get("include", ()):
        name, count = need["class"], need["count"]
        found = list(things.get(name, ()))[:count]
        fault = None
        if len(found) < count:
            fault = "missing", name, len(found)
        elif "color" in need and (seen := colors(name, found)).count(need["color"]) < count:
            fault = "color", name, tuple(seen)
        elif "position" in need:
            relation, target = need["position"]
            if groups[target] is None:
                fault = "no target", name
            else:
                seen = [relations(a.box, b.box) for a in found for b in groups[target]]
                wrong = [each for each in seen if relation not in each]
                fault = ("position", name, tuple(sorted(wrong[0]))) if wrong else None
        groups.append(None if fault else found)
        faults += [fault] if fault else []
    for limit in request.get("exclude", ()):
        count = len(things.get(limit["class"], ()))
        if count >= limit["count"]:
            faults.append(("too many", limit["class"], count))
    return Verdict(not faults, tuple(faults))


def relations(a: Sequence[float], b: Sequence[float]) -> set[str]:
    """Returns how box a lies to box b: up to two of GenEval's relations, none where they nearly coincide."""
    a, b = (np.asarray(box, float)[:4].reshape(2, 2) for box in (a, b))
    offset = a.mean(0) - b.mean(0)
    margin = MARGIN * (np.abs(a[1] - a[0]) + np.abs(b[1] - b[0]))
    clear = np.maximum(np.abs(offset) - margin, 0) * np.sign(offset)
    if (np.abs(clear) < 1e-3).all():
        return set()
    right, down = clear / np.linalg.norm(offset)
    held = {
        "left of": right < -0.5,
        "right of": right > 0.5,
        "above": down < -0.5,
        "below": down > 0.5,
    }
    return {name for name, holds in held.items() if holds}


def cut_out(image: Image.Image, thing: Detection) -> Image.Image:
    """Cuts a thing out of a picture, on grey where it has a mask."""
    image = image.convert("RGB")
    if thing.mask is not None:
        ground = Image.new("RGB", image.size, GREY)
        image = Image.composite(image, ground, Image.fromarray(np.asarray(thing.mask, bool)))
    return image.crop(thing.box)


def color_sentences(name: str) -> list[list[str]]:
    """Returns the sentences of each colour whose features make the classifier of a class."""
    ways = "a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object"
    return [[way.format(color, name) for way in ways] for color in COLORS]


def color_classifier(text: np.ndarray) -> np.ndarray:
    """Makes the classifier of text features [colors, sentences, D]: normalized means of normalized ones."""
    text = text / np.linalg.norm(text, axis=-1, keepdims=True)
    mean = text.mean(1)
    return mean / np.linalg.norm(mean, axis=-1, keepdims=True)


def make_colors(
    image: Image.Image,
    image_features: Callable[[list[Image.Image]], np.ndarray],
    classifier: Callable[[str], np.ndarray],
) -> Colors:
    """Makes the ``colors`` of `judge` for a picture, with CLIP.

    Args:
      image_features: pictures to features [N, D].
      classifier: the `color_classifier` of a class.
    """

    def colors(name, things):
        features = image_features([cut_out(image, thing) for thing in things])
        return [COLORS[i] for i in (features @ classifier(name).T).argmax(1)]

    return colors


class Result(NamedTuple):
    """A picture's line of GenEval's ``results.jsonl``; ``things`` are what its detector kept, without masks."""

    filename: str
    request: Request
    correct: bool
    things: dict[str, list[Detection]]


def read_results(path: AnyPath) -> list[Result]:
    """Reads the file that GenEval's ``evaluate_images.py`` writes.

    Raises:
      UserError: naming the file and the line, for anything else.
    """
    try:
        lines = read_text(path, 1 << 30).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    results = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            boxes = json.loads(row["details"])
            request = json.loads(row["metadata"])
            things = {
                name: [Detection(tuple(map(float, box[:4])), float(box[4])) for box in found]
                for name, found in boxes.items()
            }
            request["tag"], request["prompt"]
            if not isinstance(row["correct"], bool):
                raise TypeError(f"correct is {row['correct']!r}, not true or false")
            results.append(Result(row["filename"], request, row["correct"], things))
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise UserError(
                f"{path}, line {number} is none of GenEval's results ({error!r})"
            ) from error
    if not results:
        raise UserError(f"{path} has no results")
    return results


def missing_tasks(requests: Iterable[Request]) -> list[str]:
    """Returns GenEval's tasks of which there is no request; ``overall`` is then that of the others."""
    found = {request["tag"] for request in requests}
    return [tag for tag in TAGS if tag not in found]


def summarize(pairs: Iterable[tuple[Request, bool]]) -> dict[str, Any]:
    """Computes GenEval's numbers from each picture's request and whether it is right.

    Returns:
      ``overall``, the mean over tasks; each task by its tag; ``images``, the share of right pictures;
      ``prompts``, the share with a right picture. Each is a dict of ``value``, ``standard_error`` (pictures
      of one prompt are not independent: errors are over prompts) and ``count``.
    """
    pairs = list(pairs)
    keys = [json.dumps(request, sort_keys=True) for request, _ in pairs]
    right = np.array([correct for _, correct in pairs], float)
    tags = [request["tag"] for request, _ in pairs]
    numbers = {}

    def add(name, values, groups):
        value, error = mean_with_error(values, groups)
        numbers[name] = dict(value=value, standard_error=error, count=len(values))

    for tag in dict.fromkeys(tags):
        rows = [i for i, each in enumerate(tags) if each == tag]
        add(tag, right[rows], [keys[i] for i in rows])
    tasks = list(numbers.values())
    error = np.sqrt(sum(each["standard_error"] ** 2 for each in tasks)) / len(tasks)
    overall = float(np.mean([each["value"] for each in tasks]))
    numbers["overall"] = dict(value=overall, standard_error=float(error), count=len(tasks))
    add("images", right, keys)
    best: dict[str, float] = {}
    for key, value in zip(keys, right, strict=True):
        best[key] = max(best.get(key, 0.0), value)
    add("prompts", np.array(list(best.values())), None)
    return numbers
