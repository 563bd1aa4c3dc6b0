"""Image sources by what a path is: a folder, tar shards, ArrayRecord files, a TFDS data set."""

import bisect
import glob
import os
from collections.abc import Sequence
from pathlib import Path

from ...core.errors import UserError
from .folders import is_image, open_folder
from .image_records import PATTERN, open_array_records
from .images import MAX_PIXELS
from .records import Record, Rejected, Source, hash_identity
from .tars import open_tars
from .tfds_source import open_tfds

TFDS = "tfds:"


def open_images(
    paths: Sequence[str | os.PathLike],
    *,
    data_dir: str | os.PathLike = "data",
    image_feature: str = "image",
    caption_feature: str = "caption",
    cache_dir: str | os.PathLike | None = None,
    max_pixels: int = MAX_PIXELS,
) -> tuple[Source, ...]:
    """Opens image sources, one for each path.

    A path is one of:

    - ``tfds:NAME[/CONFIG][:SPLIT]``: `tfds_source.open_tfds`
    - a folder with ``*.tar`` in it, a .tar, or a pattern of them: `tars.open_tars`
    - a folder with ``*.array_record`` in it, such a file, or a pattern of them:
      `image_records.open_array_records`
    - any other folder: `folders.open_folder`

    Patterns have ``*``, ``?``, ``[...]`` and ``**``; their files are sorted by path.

    Args:
      paths: at least one.
      data_dir: where prepared TFDS data sets lie.
      image_feature: of TFDS data sets.
      caption_feature: likewise; empty for none.
      cache_dir: of the indices of tar shards; beside the shards if left out.
      max_pixels: see `images.decode_image`.

    Raises:
      UserError: a path that is none of these or not there, or what the functions above raise.
    """
    if not paths:
        raise UserError("no image source: set config.data.images", exit_code=2)
    sources = []
    for path in map(os.fspath, paths):
        if path.startswith(TFDS):
            source = open_tfds(
                path.removeprefix(TFDS),
                data_dir=data_dir,
                image_feature=image_feature,
                caption_feature=caption_feature,
                max_pixels=max_pixels,
            )
        else:
            source = _open_path(path, cache_dir, max_pixels)
        sources.append(source)
    return tuple(sources)


def _open_path(path: str, cache_dir: str | os.PathLike | None, max_pixels: int) -> Source:
    expanded = Path(path).expanduser()
    if expanded.is_dir():
        inside = sorted(file for file in expanded.iterdir() if not file.name.startswith("."))
        files = [file for file in inside if _kind(file) is not None]
        if (expanded / "dataset_info.json").is_file():
            raise UserError(
                f"{path} is a prepared TFDS data set: name it tfds:NAME, below config.data.dir"
            )
        if not files:
            return open_folder(expanded, name=path, max_pixels=max_pixels)
        if lone := [file for file in inside if is_image(file.name)]:
            raise UserError(f"{path} has both {files[0].name} and {lone[0].name}: keep them apart")
    elif expanded.is_file():
        files = [expanded]
    else:
        found = glob.glob(str(expanded), recursive=True)
        files = [Path(file) for file in sorted(found)]
        if not files:
            what = "no file matches" if glob.has_magic(path) else "there is no file or folder"
            raise UserError(f"image source {path!r}: {what}")
    kinds = {_kind(file) for file in files}
    if kinds == {"tar"}:
        return open_tars(files, name=path, cache_dir=cache_dir, max_pixels=max_pixels)
    if kinds == {"array_record"}:
        return open_array_records(files, name=path, max_pixels=max_pixels)
    odd = next(file for file in files if _kind(file) != "tar")
    raise UserError(
        f"image source {path!r} must be a folder of images, or *.tar or *.array_record files of one kind; "
        f"it has {odd}"
    )


def _kind(file: Path) -> str | None:
    if PATTERN.fullmatch(file.name):
        return "array_record"
    return "tar" if file.suffix == ".tar" else None


class Concatenation:
    """Sources one after the other as one `Source`.

    Keys of several sources may be the same: the number of the source, from 0, stands before each, as in
    ``0/cat``. An only source keeps its keys.

    Attributes:
      sources: the parts.
      starts: the number of the first record of each.
    """

    def __init__(self, sources: Sequence[Source]):
        if not sources:
            raise UserError("there is no source to read from")
        self.sources = tuple(sources)
        self.starts, total = [], 0
        for source in self.sources:
            self.starts.append(total)
            total += len(source)
        self._length = total
        self.name = ", ".join(source.name for source in self.sources)
        self.identity = hash_identity("all", [source.identity for source in self.sources])

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Record:
        """The record; raises `Rejected`."""
        number, local = self.locate(index)
        try:
            record = self.sources[number][local]
        except Rejected as rejected:
            raise Rejected(self._key(number, rejected.key), rejected.reason) from rejected
        return record._replace(key=self._key(number, record.key))

    def measure(self, index: int) -> tuple[str, tuple[int, int]]:
        """Key and (height, width); raises `Rejected`."""
        number, local = self.locate(index)
        try:
            key, size = self.sources[number].measure(local)
        except Rejected as rejected:
            raise Rejected(self._key(number, rejected.key), rejected.reason) from rejected
        return self._key(number, key), size

    def locate(self, index: int) -> tuple[int, int]:
        """Number of the source of a record, and the record's number in it; raises IndexError."""
        if not 0 <= index < self._length:
            raise IndexError(index)
        number = bisect.bisect_right(self.starts, index) - 1
        return number, index - self.starts[number]

    def _key(self, number: int, key: str) -> str:
        return key if len(self.sources) == 1 else f"{number}/{key}"
