"""Scenes of the digits world: real handwriting in six colours, drawn for captions that leave parts open.

A scene is a grid of cells of 8x8 pixels with one background colour; one or two cells hold a
handwritten digit (scikit-learn's 1,797 digits) in a colour that is not the background's:
``pixel = background (1 - a) + colour a`` with ``a`` the ink in [0, 1]. One fifth of the handwriting
is held out for the test split.

A caption such as ``a red 3 left of a green 7`` names each colour with probability 1/2. Parts that it
leaves open (a colour, the handwriting, in ``large`` a place) are uniform in the data. Every caption of
the data leaves a colour or a place open, so the mean image of a caption is wrong and a model that averages
scores low.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from ..core.errors import UserError
from .captions import COLORS, RELATIONS, Prompt, draw_prompt, parse_caption, write_caption
from .worlds import CELL, get_world

# Red, green, blue in [-1, 1]: corners of the cube, so that the nearest colour is never in doubt.
PALETTE = np.array(
    [[1, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, -1], [1, -1, 1], [-1, 1, 1]], np.float32
)


@dataclasses.dataclass(frozen=True)
class Mark:
    """One digit of a scene: cell (row-major), value 0..9, colour index, row of `strokes`."""

    cell: int
    digit: int
    color: int
    handwriting: int


@dataclasses.dataclass(frozen=True)
class Scene:
    """A picture before rendering. ``marks`` stand in the order of the caption's things."""

    cells: tuple[int, int]
    background: int
    marks: tuple[Mark, ...]


@functools.cache
def strokes() -> tuple[np.ndarray, np.ndarray]:
    """All handwriting: ink [1797,8,8] float32 in [0,1] (steps of 1/16) and labels [1797] int64.

    Source: scikit-learn's ``load_digits``, which is part of the installed package.
    """
    import sklearn.datasets  # here, because it takes longer to import than JAX

    data = sklearn.datasets.load_digits()
    return (data.images / 16).astype(np.float32), data.target


@functools.cache
def handwriting(split: str) -> tuple[np.ndarray, ...]:
    """For each digit 0..9 the rows of `strokes` in a split, 'train' or (one fifth) 'test'."""
    if split not in ("train", "test"):
        raise UserError(f"split {split!r} is unknown: choose 'train' or 'test'")
    # RandomState, whose stream NumPy has frozen: the split must never change.
    random = np.random.RandomState(0)
    _, labels = strokes()
    pools = []
    for digit in range(10):
        rows = random.permutation(np.flatnonzero(labels == digit))
        held_out = round(len(rows) / 5)
        pools.append(rows[:held_out] if split == "test" else rows[held_out:])
    return tuple(pools)


def draw_scene(
    generator: np.random.Generator, prompt: Prompt, cells: tuple[int, int], split: str
) -> Scene:
    """Draws a scene that fits a prompt; everything that the prompt leaves open is drawn at random.

    Two things stand side by side in the order of the caption, unless it names another place: with random
    places, a small teacher took ten times as long to follow captions. In a world of one row a lone thing
    stands in the first cell: with random cells, a teacher with guidance drew a third of them in neither.
    Things without a colour in the caption share one.

    Raises:
      UserError: the prompt does not fit in a grid of ``cells``, or the split is unknown.
    """
    rows, columns = cells
    things = prompt.things
    sideways = prompt.relation in RELATIONS[:2]
    line = columns if sideways else rows  # cells along the direction of the relation
    if len(things) > rows * columns or (prompt.relation and line < 2):
        raise UserError(
            f"caption {write_caption(prompt)!r} does not fit in {rows}x{columns} cells: "
            "use the world 'large'"
        )

    said = {prompt.background, *(thing.color for thing in things)}
    unsaid = [int(c) for c in generator.permutation(len(COLORS)) if c not in said]
    background = unsaid.pop() if prompt.background is None else prompt.background
    shared = unsaid.pop()
    colors = [shared if thing.color is None else thing.color for thing in things]

    if prompt.relation:
        near, far = sorted(generator.permutation(line)[:2])
        across = generator.integers(rows if sideways else columns)
        places = [across * columns + p if sideways else p * columns + across for p in (near, far)]
        if prompt.relation in ("right of", "below"):
            places.reverse()
    elif rows == 1 or (len(things) == 2 and columns > 1):
        first = generator.integers(rows) * columns
        places = range(first, first + len(things))
    else:
        places = generator.permutation(rows * columns)[: len(things)]

    pools = handwriting(split)
    # One permutation for each value: equal digits of a scene differ in handwriting.
    hands = {d: list(generator.permutation(pools[d])[:3]) for d in {t.digit for t in things}}
    marks = tuple(
        Mark(int(place), thing.digit, color, int(hands[thing.digit].pop()))
        for place, thing, color in zip(places, things, colors, strict=True)
    )
    return Scene(cells, background, marks)


def render(scene: Scene) -> np.ndarray:
    """Draws the picture of a scene: uint8 [8 rows, 8 columns, 3], 0 and 255 for -1 and 1."""
    rows, columns = scene.cells
    ground = PALETTE[scene.background]
    canvas = np.tile(ground, (rows * CELL, columns * CELL, 1))
    ink, _ = strokes()
    for mark in scene.marks:
        row, column = (CELL * p for p in divmod(mark.cell, columns))
        color = PALETTE[mark.color] - ground
        canvas[row : row + CELL, column : column + CELL] += ink[mark.handwriting][..., None] * color
    return np.rint((canvas + 1) * 127.5).astype(np.uint8)


def draw_images(world: str, captions: Sequence[str], split: str, seed: int) -> np.ndarray:
    """Draws one real picture for each caption: float32 [N,H,W,3] in [-1,1]."""
    generator = np.random.default_rng(seed)
    cells = get_world(world).cells
    scenes = (draw_scene(generator, parse_caption(c), cells, split) for c in captions)
    return to_float(np.stack([render(scene) for scene in scenes]))


def to_float(images: np.ndarray) -> np.ndarray:
    """Converts uint8 images 0..255 of any shape to float32 in [-1,1]."""
    return images.astype(np.float32) / 127.5 - 1


def held_out_prompts(world: str, count: int, seed: int) -> list[str]:
    """Draws ``count`` captions, equally many (within one) of each category of the world.

    The random stream differs from those of the data for every seed. A caption of few words also occurs in
    training; a long one hardly ever does.
    """
    cells, categories = get_world(world).cells, get_world(world).categories
    generator = np.random.default_rng([2, seed])
    captions = []
    while len(captions) < count:
        prompt = draw_prompt(generator, cells)
        if prompt.category == categories[len(captions) % len(categories)]:
            captions.append(write_caption(prompt))
    return captions
