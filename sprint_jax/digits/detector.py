"""GenEval in the digits world: captions as its requests, and readings of the judge as exact boxes."""

from collections.abc import Sequence
from typing import Any

from ..metrics import geneval
from ..metrics.geneval import Detection
from .captions import COLORS, parse_caption
from .judge import Reading
from .worlds import CELL, get_world

# Categories of captions whose tag in GenEval has another name.
_TAGS = {"two_objects": "two_object", "color_attribution": "color_attr"}


def request_of(caption: str) -> geneval.Request:
    """Returns a caption as a request of GenEval, whose classes are digits; it says nothing of backgrounds.

    Raises:
      UserError: the caption is outside the grammar.
    """
    prompt = parse_caption(caption)

    def need(thing, count=1):
        color = {} if thing.color is None else {"color": COLORS[thing.color]}
        return {"class": str(thing.digit), "count": count} | color

    things, more = prompt.things, {}
    if prompt.counts:
        include = [need(things[0], len(things))]
        more["exclude"] = [{"class": str(things[0].digit), "count": len(things) + 1}]
    elif prompt.relation:
        include = [need(things[1]), need(things[0]) | {"position": [prompt.relation, 0]}]
    else:
        include = [need(thing) for thing in things]
    tag = _TAGS.get(prompt.category, prompt.category)
    return {"tag": tag, "include": include} | more | {"prompt": caption}


def detect(reading: Reading, world: str) -> tuple[geneval.Things, geneval.Colors]:
    """Returns the digits of a reading as boxes in pixels, all of confidence 1, and their colours for `judge`.

    A picture that cannot be read has none.
    """
    columns, things, colors = get_world(world).cells[1], {}, {}
    for cell, digit in enumerate(reading.digits if reading.readable else ()):
        if digit >= 0:
            row, column = divmod(cell, columns)
            box = (CELL * column, CELL * row, CELL * (column + 1), CELL * (row + 1))
            things.setdefault(str(digit), []).append(Detection(box, 1.0))
            colors[box] = COLORS[reading.colors[cell]]
    return things, lambda _, found: [colors[thing.box] for thing in found]


def geneval_scores(
    readings: Sequence[Reading], captions: Sequence[str], world: str
) -> dict[str, Any]:
    """Computes GenEval's numbers (`metrics.geneval.summarize`) of readings, one for each caption."""
    pairs = []
    for reading, caption in zip(readings, captions, strict=True):
        request, (things, colors) = request_of(caption), detect(reading, world)
        kept = geneval.select(things, request["tag"])
        pairs.append((request, geneval.judge(request, kept, colors).correct))
    return geneval.summarize(pairs)
