"""GenEval's 553 prompts, made again from their seed, and what each of them asks for.

Source: Ghosh et al., arXiv 2310.11513 (djghosh13/geneval, prompts/create_prompts.py).
"""

import json
from typing import Any

import numpy as np

# COCO's 80 things in GenEval's words and order, "person" first.
_WORDS = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,"
    "parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,"
    "tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,"
    "tennis racket,bottle,wine glass,cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,"
    "hot dog,pizza,donut,cake,chair,couch,potted plant,bed,dining table,toilet,tv,laptop,computer mouse,"
    "tv remote,computer keyboard,cell phone,microwave,oven,toaster,sink,refrigerator,book,clock,vase,"
    "scissors,teddy bear,hair drier,toothbrush"
)
CLASSES = tuple(_WORDS.split(","))
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
_NUMBERS = ("two", "three", "four")

Request = dict[str, Any]


def make_prompts(seed: int = 43, count: int = 100) -> list[Request]:
    """Makes the prompts; those of seed 43 and 100 for each task are the published ones.

    Returns:
      Dicts with ``tag``, ``include`` (things that must be seen: ``class, count``, and for some ``color`` or
      ``position``, a relation to the things of an earlier entry), for counting ``exclude``, and ``prompt``.
    """
    random = np.random.default_rng(seed)
    order = random.choice(len(CLASSES), size=min(count, len(CLASSES)), replace=False)
    requests = [_request("single_object", [_thing(CLASSES[i])], _a(CLASSES[i])) for i in order]
    for draw in (_two_objects, _counting, _colors, _position, _color_attribution):
        requests += [draw(random) for _ in range(count)]
    return list({json.dumps(each, sort_keys=True): each for each in requests}.values())


def to_lines(requests: list[Request]) -> str:
    """Returns requests as JSON lines, as in GenEval's ``evaluation_metadata.jsonl``."""
    return "".join(json.dumps(each) + "\n" for each in requests)


def _request(tag: str, include: list, words: str, exclude: list | None = None) -> Request:
    """A request; its keys stand in the order of the published file."""
    more = {} if exclude is None else {"exclude": exclude}
    return {"tag": tag, "include": include} | more | {"prompt": f"a photo of {words}"}


def _thing(name: str, count: int = 1, **more) -> dict[str, Any]:
    return {"class": name, "count": count} | more


def _a(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def _two(random: np.random.Generator) -> list[str]:
    return [CLASSES[i] for i in random.choice(len(CLASSES), size=2, replace=False)]


def _two_objects(random) -> Request:
    first, second = _two(random)
    return _request("two_object", [_thing(first), _thing(second)], f"{_a(first)} and {_a(second)}")


def _counting(random) -> Request:
    name = CLASSES[random.choice(len(CLASSES))]
    count = int(random.integers(2, 4, endpoint=True))
    words = f"{_NUMBERS[count - 2]} {name}{'es' if name[-1] == 's' else 's'}"
    return _request("counting", [_thing(name, count)], words, [_thing(name, count + 1)])


def _colors(random) -> Request:
    # No people of a color.
    name = CLASSES[1 + random.choice(len(CLASSES) - 1)]
    color = COLORS[random.choice(len(COLORS))]
    return _request("colors", [_thing(name, color=color)], f"{_a(color)} {name}")


def _position(random) -> Request:
    first, second = _two(random)
    relation = RELATIONS[random.choice(len(RELATIONS))]
    include = [_thing(second), _thing(first, position=[relation, 0])]
    return _request("position", include, f"{_a(first)} {relation} {_a(second)}")


def _color_attribution(random) -> Request:
    names = [CLASSES[1 + i] for i in random.choice(len(CLASSES) - 1, size=2, replace=False)]
    colors = [COLORS[i] for i in random.choice(len(COLORS), size=2, replace=False)]
    pairs = list(zip(names, colors, strict=True))
    words = " and ".join(f"{_a(color)} {name}" for name, color in pairs)
    return _request("color_attr", [_thing(name, color=color) for name, color in pairs], words)
