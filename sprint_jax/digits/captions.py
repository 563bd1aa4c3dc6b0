"""Captions of the digits world: a small grammar, its writer and its parser.

    caption = (many | one [joint one]) [" on " color]
    one     = "a " [color " "] digit
    many    = "two " [color " "] digit "s"
    joint   = " and " | " left of " | " right of " | " above " | " below "

A prompt is the meaning of a caption. What the caption leaves open (a colour, a place, the handwriting) is
random in pictures of it. Categories are GenEval's (arXiv 2310.11513).
"""

import dataclasses
import itertools
import re
from collections.abc import Sequence

import numpy as np

from ..core.errors import UserError

COLORS = ("red", "green", "blue", "yellow", "purple", "cyan")
DIGITS = tuple("0123456789")
RELATIONS = ("left of", "right of", "above", "below")
COUNTS = {"two": 2}
CATEGORIES = ("single_object", "colors", "counting", "two_objects", "position")
CATEGORIES += ("color_attribution",)
_THING = r"a (?:({colors}) )?(\d)".format(colors="|".join(COLORS))
_GRAMMAR = re.compile(
    rf"(?:({'|'.join(COUNTS)}) (?:({'|'.join(COLORS)}) )?(\d)s"
    rf"|{_THING}(?: (and|{'|'.join(RELATIONS)}) {_THING})?)"
    rf"(?: on ({'|'.join(COLORS)}))?"
)


@dataclasses.dataclass(frozen=True)
class Thing:
    """One digit of a caption: its value 0..9 and its colour (index in COLORS), or None if left open."""

    digit: int
    color: int | None = None


@dataclasses.dataclass(frozen=True)
class Prompt:
    """The meaning of a caption: exactly these digits and no others.

    Attributes:
      things: one `Thing` for each digit of the picture, in the order of the caption.
      relation: one of RELATIONS, of the first thing to the second, or None.
      background: index in COLORS, or None if left open.
    """

    things: tuple[Thing, ...]
    relation: str | None = None
    background: int | None = None

    @property
    def counts(self) -> bool:
        """Whether all things are the same, as in ``two red 3s``."""
        return len(self.things) > 1 and len(set(self.things)) == 1

    @property
    def category(self) -> str:
        """GenEval's category: one of CATEGORIES."""
        if self.counts:
            return "counting"
        if self.relation:
            return "position"
        colored = any(thing.color is not None for thing in self.things)
        if len(self.things) > 1:
            return "color_attribution" if colored else "two_objects"
        return "colors" if colored or self.background is not None else "single_object"


def write_caption(prompt: Prompt) -> str:
    """Writes the sentence for a prompt; `parse_caption` is its inverse."""
    phrases = [
        ("" if thing.color is None else f"{COLORS[thing.color]} ") + str(thing.digit)
        for thing in prompt.things
    ]
    if prompt.counts:
        number = {count: word for word, count in COUNTS.items()}[len(phrases)]
        words = f"{number} {phrases[0]}s"
    else:
        words = "a " + f" {prompt.relation or 'and'} a ".join(phrases)
    return words + ("" if prompt.background is None else f" on {COLORS[prompt.background]}")


def parse_caption(caption: str) -> Prompt:
    """Returns the prompt of a caption.

    Raises:
      UserError: the sentence is outside the grammar, or has a digit in the background's colour.
    """
    match = _GRAMMAR.fullmatch(caption)
    if match is None:
        raise UserError(
            f'caption {caption!r} is not of the digits world: write it as "a red 3", '
            '"two 3s on blue", "a 3 and a red 7" or "a 3 left of a 7"'
        )
    count, many_color, many_digit, *one, joint, color, digit, ground = match.groups()

    def thing(color: str | None, digit: str) -> Thing:
        return Thing(int(digit), None if color is None else COLORS.index(color))

    if count:
        things = (thing(many_color, many_digit),) * COUNTS[count]
    else:
        things = (thing(*one), thing(color, digit)) if joint else (thing(*one),)
    background = None if ground is None else COLORS.index(ground)
    if background is not None and any(thing.color == background for thing in things):
        raise UserError(f"caption {caption!r} hides a digit in its background: change one colour")
    return Prompt(things, joint if joint in RELATIONS else None, background)


def arrange(
    prompt: Prompt, background: int, digits: Sequence[int], colors: Sequence[int], columns: int
) -> tuple[int, ...] | None:
    """Returns the cell of each thing of a prompt in a picture, or None if the picture shows something else.

    Args:
      background: the picture's background, index in COLORS.
      digits: value 0..9 in each cell (row-major), -1 for none.
      colors: index in COLORS in each cell.
      columns: cells in a row.

    Returns:
      The first arrangement in the order of cells.
    """
    marked = [cell for cell, digit in enumerate(digits) if digit >= 0]
    if len(marked) != len(prompt.things) or prompt.background not in (None, background):
        return None
    for places in itertools.permutations(marked):
        fits = all(
            thing.digit == digits[place] and thing.color in (None, colors[place])
            for thing, place in zip(prompt.things, places, strict=True)
        )
        if fits and (prompt.relation is None or _stand(prompt.relation, *places, columns)):
            return places
    return None


def _stand(relation: str, first: int, second: int, columns: int) -> bool:
    (row, column), (other_row, other_column) = divmod(first, columns), divmod(second, columns)
    if relation in ("left of", "right of"):
        return row == other_row and (column < other_column) == (relation == "left of")
    return column == other_column and (row < other_row) == (relation == "above")


def draw_prompt(generator: np.random.Generator, cells: tuple[int, int]) -> Prompt:
    """Draws a prompt: digits, relation, and each colour with probability 1/2.

    Its colours are distinct, except that equal digits share one.
    """
    kind, relation, count = "one", None, 1
    if cells[0] * cells[1] > 1:
        kind = generator.choice(["one", "counting", "pair", "position"], p=[0.4, 0.2, 0.2, 0.2])
    if kind == "counting":
        count = int(generator.choice(list(COUNTS.values())))
    if kind == "position":
        fitting = RELATIONS if cells[0] > 1 else RELATIONS[:2]
        relation = fitting[generator.integers(len(fitting))]
    digits = generator.permutation(10)[: 1 + (kind in ("pair", "position"))]
    named = generator.random(1 + len(digits)) < 0.5
    if cells[0] == 1 and named.all():
        # Places in a single row are fixed: with every colour named, only the handwriting would be open.
        named[generator.integers(len(named))] = False
    background, *colors = (
        int(color) if said else None
        for color, said in zip(generator.permutation(len(COLORS)), named, strict=False)
    )
    things = tuple(Thing(int(d), color) for d, color in zip(digits, colors, strict=True)) * count
    return Prompt(things, relation, background)


def vocabulary() -> tuple[str, ...]:
    """Returns every word of the grammar, in a fixed order; a plural is the digit and the word ``s``."""
    relations = " ".join(RELATIONS).split()
    return tuple(dict.fromkeys(["a", "and", "on", *COUNTS, *relations, *COLORS, "s", *DIGITS]))
