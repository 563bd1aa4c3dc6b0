"""The digits world: real handwriting in six colours, with captions that leave something to chance.

A scene is a grid of cells of 8x8 pixels with one background colour; one or two cells hold a
handwritten digit (scikit-learn's 1,797 digits) in a colour that is not the background's:
``pixel = background (1 - a) + colour a`` with ``a`` the ink in [0, 1]. One fifth of the handwriting
is held out for the test split.

A caption such as ``a red 3 left of a green 7`` names each colour with probability 1/2. What it does
not say (a colour, the handwriting, in ``large`` a place) is uniform in the data. Every caption that
is written here leaves at least one vivid thing, a colour or a place, to chance: the mean image of a
caption is therefore wrong, which is what a distilled model that averages draws. Categories are
GenEval's.

`Digits` is an ordinary TFDS builder, to be copied for other data: it writes and reads ArrayRecord
without TensorFlow. (Its image feature is a ``Tensor``: TFDS encodes ``Image`` with TensorFlow.)
"""

import dataclasses
import functools
import os
import pathlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds

from sprint_jax.core.errors import UserError
from sprint_jax.digits.captions import (
    CATEGORIES,
    COLORS,
    RELATIONS,
    Prompt,
    draw_prompt,
    parse_caption,
    write_caption,
)

CELL = 8  # pixels along a side of a cell
# Red, green, blue in [-1, 1]: corners of the cube, so that the nearest colour is never in doubt.
PALETTE = np.array(
    [[1, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, -1], [1, -1, 1], [-1, 1, 1]], np.float32
)


@dataclasses.dataclass(frozen=True)
class World:
    """The size of a world: grid of cells (rows, columns) and number of scenes in each split."""

    cells: tuple[int, int]
    train: int
    test: int

    @property
    def categories(self) -> tuple[str, ...]:
        """The categories that captions of this world have."""
        return CATEGORIES if self.cells[0] * self.cells[1] > 1 else CATEGORIES[:2]


WORLDS = {
    "small": World(cells=(1, 1), train=10_000, test=2_000),  # 8x8 pixels, one digit
    "full": World(cells=(1, 2), train=20_000, test=4_000),  # 8x16 pixels, one or two digits
    "large": World(cells=(2, 2), train=20_000, test=4_000),  # 16x16 pixels, likewise
}


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


def get_world(name: str) -> World:
    """The world of that name; raises UserError for an unknown one."""
    if name not in WORLDS:
        raise UserError(
            f"world {name!r} is unknown: choose one of {', '.join(WORLDS)}", exit_code=2
        )
    return WORLDS[name]


@functools.cache
def strokes() -> tuple[np.ndarray, np.ndarray]:
    """All handwriting: ink [1797,8,8] float32 in [0,1] (steps of 1/16) and labels [1797] int64.

    Source: scikit-learn's ``load_digits``, part of the installed package; nothing is downloaded.
    """
    import sklearn.datasets  # here, because it takes longer to import than JAX

    data = sklearn.datasets.load_digits()
    return (data.images / 16).astype(np.float32), data.target


@functools.cache
def handwriting(split: str) -> tuple[np.ndarray, ...]:
    """For each digit 0..9 the rows of `strokes` in a split, 'train' or (one fifth) 'test'."""
    if split not in ("train", "test"):
        raise UserError(f"split {split!r} is unknown: choose 'train' or 'test'")
    # RandomState, whose stream NumPy has frozen: the split must be the same for ever.
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
    """Draws a scene that a prompt allows; what it leaves open is left to chance.

    Two things stand side by side in the order of the caption, unless it says another place: with
    every place left to chance, a small teacher took ten times as long to learn what a caption says.
    In a world of one row a lone thing stands in the first cell: of those whose cell was left to
    chance, a teacher with guidance drew a third in neither. Things whose colour is not said share one.

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
    """The picture of a scene: uint8 [8 rows, 8 columns, 3], 0 and 255 for -1 and 1."""
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
    """Real pictures for captions, one each: float32 [N,H,W,3] in [-1,1]."""
    generator = np.random.default_rng(seed)
    cells = get_world(world).cells
    scenes = (draw_scene(generator, parse_caption(c), cells, split) for c in captions)
    return to_float(np.stack([render(scene) for scene in scenes]))


def to_float(images: np.ndarray) -> np.ndarray:
    """uint8 images 0..255 of any shape as float32 in [-1,1]."""
    return images.astype(np.float32) / 127.5 - 1


def held_out_prompts(world: str, count: int, seed: int) -> list[str]:
    """``count`` captions, equally many (within one) of each category of the world.

    The random stream is apart from those of the data, whatever the seed: a caption with few words
    occurs in training, a long one hardly ever does.
    """
    cells, categories = get_world(world).cells, get_world(world).categories
    generator = np.random.default_rng([2, seed])
    captions = []
    while len(captions) < count:
        prompt = draw_prompt(generator, cells)
        if prompt.category == categories[len(captions) % len(categories)]:
            captions.append(write_caption(prompt))
    return captions


@dataclasses.dataclass
class DigitsConfig(tfds.core.BuilderConfig):
    """One world as a TFDS builder config."""

    world: World | None = None


class Digits(tfds.core.GeneratorBasedBuilder):
    """The digits world for TFDS: configs 'small', 'full' and 'large', splits 'train' and 'test'.

    Use it through `open_digits`, or as any builder:
    ``Digits(data_dir=..., config='full', file_format='array_record')``. Per cell (row-major), with
    -1 for an empty cell: ``digits``, ``colors`` and ``handwriting`` (row of `strokes`).
    """

    VERSION = tfds.core.Version("2.0.0")
    RELEASE_NOTES: ClassVar = {"2.0.0": "Scenes of 'full' in one row; that of 1.0.0 is 'large'."}
    BUILDER_CONFIGS: ClassVar = [DigitsConfig(name=name, world=w) for name, w in WORLDS.items()]
    # Nothing is downloaded. Without this line TFDS 4.9.10 looks for a list of checksums and needs
    # the package importlib_resources, which it does not declare (tensorflow/datasets#11212); a
    # builder that downloads must have that package installed instead.
    url_infos = None

    def _info(self) -> tfds.core.DatasetInfo:
        rows, columns = self.builder_config.world.cells
        per_cell = tfds.features.Tensor(shape=(rows * columns,), dtype=np.int32)
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Tensor(
                        shape=(rows * CELL, columns * CELL, 3), dtype=np.uint8
                    ),
                    "caption": tfds.features.Text(),
                    "category": tfds.features.Text(),
                    "background": tfds.features.ClassLabel(names=COLORS),
                    "digits": per_cell,
                    "colors": per_cell,
                    "handwriting": per_cell,
                }
            ),
        )

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        return {split: self._generate_examples(split) for split in ("train", "test")}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict]]:
        world = self.builder_config.world
        generator = np.random.default_rng([1, ("train", "test").index(split)])
        for key in range(getattr(world, split)):
            prompt = draw_prompt(generator, world.cells)
            scene = draw_scene(generator, prompt, world.cells, split)
            per_cell = np.full((3, world.cells[0] * world.cells[1]), -1, np.int32)
            for mark in scene.marks:
                per_cell[:, mark.cell] = mark.digit, mark.color, mark.handwriting
            yield (
                key,
                {
                    "image": render(scene),
                    "caption": write_caption(prompt),
                    "category": prompt.category,
                    "background": scene.background,
                    "digits": per_cell[0],
                    "colors": per_cell[1],
                    "handwriting": per_cell[2],
                },
            )


class DigitsSource:
    """Random access to a prepared split: read-only dicts of `Digits`, with text as ``str``.

    The first access reads the whole split into memory (some 50 MB): parsing 64 records anew for
    every batch would take longer than a step on the small networks of this world.
    """

    def __init__(self, records: Sequence[dict]):
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict:
        return self._rows[index]

    @functools.cached_property
    def _rows(self) -> list[dict]:
        rows = []
        for record in self._records.__getitems__(range(len(self._records))):
            row = {k: v.decode() if isinstance(v, bytes) else v for k, v in record.items()}
            for value in row.values():
                if isinstance(value, np.ndarray):
                    value.flags.writeable = False
            rows.append(row)
        return rows


def open_digits(data_dir: str | os.PathLike, world: str, split: str) -> DigitsSource:
    """Opens a split of a world; writes both splits under ``data_dir`` first if they are missing.

    Several processes may call this at once: each writes beside, the first to finish wins by one
    atomic rename, and all read the same records.

    Raises:
      UserError: unknown world or split, or a directory that cannot be written or is not whole.
    """
    get_world(world)
    handwriting(split)
    folder = pathlib.Path(data_dir).expanduser().absolute()
    builder = Digits(data_dir=folder, config=world, file_format="array_record")
    if not pathlib.Path(builder.data_path).exists():
        try:
            _prepare(folder, world)
        except OSError as error:
            raise UserError(f"cannot write the digits to {folder}: {error.strerror}") from error
        builder = Digits(data_dir=folder, config=world, file_format="array_record")
    if not builder.is_prepared():
        raise UserError(
            f"{builder.data_path} is not a whole data set: delete it to have it written"
        )
    return DigitsSource(builder.as_data_source(split))


def _prepare(folder: pathlib.Path, world: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".incomplete-digits-", dir=folder) as temporary:
        builder = Digits(data_dir=temporary, config=world, file_format="array_record")
        builder.download_and_prepare()
        ready = pathlib.Path(builder.data_path)
        target = folder / ready.relative_to(temporary)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            ready.rename(target)
        except OSError:
            if not target.is_dir():
                raise
            # Another process was quicker. Records depend on nothing but the code: its are ours.
