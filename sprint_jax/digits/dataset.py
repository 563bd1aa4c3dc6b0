"""The digits world as a TFDS data set: a builder to copy for other data, and random access to its records.

`Digits` writes and reads ArrayRecord without TensorFlow. Its image feature is a ``Tensor``, since TFDS
encodes ``Image`` with TensorFlow.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds

from ..core.errors import UserError
from ..core.storage import AnyPath, as_path, fetch, in_bucket, local_output
from .captions import COLORS, draw_prompt, write_caption
from .scenes import draw_scene, handwriting, render
from .worlds import WORLDS, World, get_world


@dataclasses.dataclass
class DigitsConfig(tfds.core.BuilderConfig):
    """One world as a TFDS builder config."""

    world: World | None = None


class Digits(tfds.core.GeneratorBasedBuilder):
    """The digits world for TFDS: configs 'small', 'full' and 'large', splits 'train' and 'test'.

    Use it through `open_digits`, or as any builder:
    ``Digits(data_dir=..., config='full', file_format='array_record')``. Per cell (row-major), with
    -1 for an empty cell: ``digits``, ``colors`` and ``handwriting`` (row of `scenes.strokes`).
    """

    VERSION = tfds.core.Version("2.0.0")
    RELEASE_NOTES: ClassVar = {"2.0.0": "Scenes of 'full' in one row; that of 1.0.0 is 'large'."}
    BUILDER_CONFIGS: ClassVar = [DigitsConfig(name=name, world=w) for name, w in WORLDS.items()]
    # Nothing is downloaded. Without this line TFDS 4.9.10 looks for a list of checksums and needs
    # the package importlib_resources, which it does not declare (tensorflow/datasets#11212); a
    # builder that downloads must have that package installed instead.
    url_infos = None

    def _info(self) -> tfds.core.DatasetInfo:
        world = self.builder_config.world
        tensor = tfds.features.Tensor
        per_cell = tensor(shape=(world.cells[0] * world.cells[1],), dtype=np.int32)
        features = {
            "image": tensor(shape=(*world.size, 3), dtype=np.uint8),
            "caption": tfds.features.Text(),
            "category": tfds.features.Text(),
            "background": tfds.features.ClassLabel(names=COLORS),
            "digits": per_cell,
            "colors": per_cell,
            "handwriting": per_cell,
        }
        return tfds.core.DatasetInfo(
            builder=self, description=__doc__, features=tfds.features.FeaturesDict(features)
        )

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        return {split: self._generate_examples(split) for split in ("train", "test")}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict]]:
        world = self.builder_config.world
        generator = np.random.default_rng([1, ("train", "test").index(split)])
        for key in range(getattr(world, split)):
            prompt = draw_prompt(generator, world.cells)
            scene = draw_scene(generator, prompt, world.cells, split)
            cells = np.full((3, world.cells[0] * world.cells[1]), -1, np.int32)
            for mark in scene.marks:
                cells[:, mark.cell] = mark.digit, mark.color, mark.handwriting
            record = {
                "image": render(scene),
                "caption": write_caption(prompt),
                "category": prompt.category,
                "background": scene.background,
            }
            yield key, record | dict(zip(("digits", "colors", "handwriting"), cells, strict=True))


class DigitsSource:
    """Random access to a prepared split: read-only dicts of `Digits`, with text as ``str``.

    The first access reads the whole split into memory (some 50 MB): parsing 64 records for every batch
    would take longer than a step of the small networks of this world.
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

    From a bucket, the world is copied to this machine.

    Several processes may call this at once: TFDS writes to a folder beside and renames it when it is
    whole. The first to finish wins, and all read the same records, which depend on the code alone.

    Raises:
      UserError: unknown world or split, or a directory that cannot be written or is not whole.
    """
    get_world(world)
    handwriting(split)
    if in_bucket(data_dir):
        data_dir = _copy_world(as_path(data_dir), world)
    folder = pathlib.Path(data_dir).expanduser().absolute()
    builder = _builder(folder, world)
    if not pathlib.Path(builder.data_path).exists():
        try:
            builder.download_and_prepare(download_dir=folder / "digits")
        except OSError as error:
            if not _builder(folder, world).is_prepared():
                raise UserError(f"cannot write the digits to {folder}: {error}") from error
        builder = _builder(folder, world)
    if not builder.is_prepared():
        raise UserError(
            f"{builder.data_path} is not a whole data set: delete it to have it written"
        )
    return DigitsSource(builder.as_data_source(split))


def _copy_world(folder: AnyPath, world: str) -> pathlib.Path:
    """A copy here of a bucket's folder with this world, which is written there if it is missing."""
    mark = folder / Digits.name / world / str(Digits.VERSION) / "dataset_info.json"
    if not mark.is_file():
        with local_output(folder, (mark.name,)) as local:
            open_digits(local, world, "train")
    return fetch(folder, (f"{Digits.name}/{world}/*",))


def _builder(folder: pathlib.Path, world: str) -> Digits:
    return Digits(data_dir=folder, config=world, file_format="array_record")
