"""Image sources by path: a folder, tar shards, ArrayRecord files, a TFDS data set."""

import glob
from collections.abc import Sequence
from pathlib import Path

from ...core.errors import UserError
from ...core.storage import AnyPath, as_path, find, in_bucket
from .folders import is_image, open_folder
from .image_records import PATTERN, open_array_records
from .records import Source
from .tars import open_tars
from .tfds_source import open_tfds

TFDS = "tfds:"


def open_images(
    paths: Sequence[str],
    *,
    data_dir: str = "data",
    image_feature: str = "image",
    caption_feature: str = "caption",
) -> tuple[Source, ...]:
    """Opens image sources, one for each path.

    A path is one of:

    - ``tfds:NAME[/CONFIG][:SPLIT]``: `tfds_source.open_tfds`
    - a folder with ``*.tar`` in it, a .tar, or a pattern of them: `tars.open_tars`
    - a folder with ``*.array_record`` in it, such a file, or a pattern of them:
      `image_records.open_array_records`
    - any other folder: `folders.open_folder`

    Patterns have ``*``, ``?``, ``[...]`` and ``**``; their files are sorted by path. ``data_dir`` and the
    features are of TFDS data sets.

    Raises:
      UserError: no path, a path that is none of these or not there, or as the functions above.
    """
    if not paths:
        raise UserError(
            "config.data.images is empty: name folders, tars, record files or data sets", 2
        )
    features = dict(image_feature=image_feature, caption_feature=caption_feature)
    return tuple(
        open_tfds(path.removeprefix(TFDS), data_dir=data_dir, **features)
        if path.startswith(TFDS)
        else _open_path(path)
        for path in map(str, paths)
    )


def _open_path(path: str) -> Source:
    expanded = as_path(path).expanduser()
    if expanded.is_dir():
        inside = sorted(file for file in expanded.iterdir() if not file.name.startswith("."))
        files = [file for file in inside if _kind(file) is not None]
        if (expanded / "dataset_info.json").is_file():
            raise UserError(
                f"{path} is a prepared TFDS data set: name it tfds:NAME, below config.data.dir"
            )
        if not files:
            return open_folder(expanded, path)
        if lone := [file for file in inside if is_image(file.name)]:
            raise UserError(f"{path} has both {files[0].name} and {lone[0].name}: keep them apart")
    else:
        if expanded.is_file():
            files = [expanded]
        elif in_bucket(expanded):
            files = find(path)
        else:
            files = [Path(file) for file in sorted(glob.glob(str(expanded), recursive=True))]
        if not files:
            raise UserError(f"image source {path!r}: there is no such file or folder")
    if other := [file for file in files if not in_bucket(file) and not file.is_file()]:
        raise UserError(
            f"image source {path!r}: {other[0]} is a folder, a device, a pipe or a dangling link"
        )
    kinds = {_kind(file) for file in files}
    if kinds == {"tar"}:
        return open_tars(files, path)
    if kinds == {"array_record"}:
        return open_array_records(files, path)
    odd = next(file for file in files if _kind(file) != "tar")
    raise UserError(
        f"image source {path!r} must be a folder of images, or *.tar or *.array_record files of one kind; "
        f"it has {odd}"
    )


def _kind(file: AnyPath) -> str | None:
    if PATTERN.fullmatch(file.name):
        return "array_record"
    return "tar" if file.suffix == ".tar" else None
