"""TFDS data sets by name, read without TensorFlow and without the code that made them."""

import functools
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from ...core.errors import UserError
from ...core.storage import AnyPath, as_path, fetch, in_bucket
from .caption_files import read_captions
from .image_records import RecordSource
from .images import MAX_PIXELS
from .records import Caption, Rejected, fingerprint, hash_identity

KEY_FEATURES = ("key", "id")
_VERSION = re.compile(r"\d+\.\d+\.\d+")


def open_tfds(
    name: str,
    *,
    data_dir: str | os.PathLike,
    image_feature: str = "image",
    caption_feature: str = "caption",
) -> RecordSource:
    """Opens a prepared data set that lies below ``data_dir``.

    An ``Image`` feature is read as the bytes it was made from and decoded as files are; a ``Tensor`` is
    taken as it is, uint8 [H, W], or [H, W, C] with C of 1, 3 or 4. Captions are a ``Text`` or a sequence
    of them. Keys are those of a feature ``key`` or ``id`` where there is one, else the split and the
    number in it, such as ``train_00000012``.

    Args:
      name: ``NAME[/CONFIG[/VERSION]][:SPLIT]``. An only config need not be named; the split, ``train`` if
        left out, may be a part, such as ``train[:80%]``. The newest version counts.
      data_dir: the data_dir that the set was prepared with; one in a bucket is copied to this machine.
      caption_feature: empty for none.

    Raises:
      UserError: no such set, config, split or feature, or a format without random access.
    """
    path, _, split = name.partition(":")
    split = split or "train"
    root = _copy(as_path(data_dir), path, split) if in_bucket(data_dir) else Path(data_dir)
    folder = _find(root.expanduser().absolute(), path)
    try:
        builder = tfds.builder_from_directory(folder)
        features = builder.info.features
        _check_features(features, image_feature, caption_feature, name)
        images = [key for key, value in features.items() if isinstance(value, tfds.features.Image)]
        decoders = {key: tfds.decode.SkipDecoding() for key in images}
        examples = builder.as_data_source(split, decoders=decoders)
        files = [fingerprint(file) for file in sorted(folder.iterdir()) if file.is_file()]
    except UserError:
        raise
    except NotImplementedError as error:
        raise UserError(
            f"{folder} has no random access: prepare it with file_format='array_record'"
        ) from error
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"cannot open tfds:{name} of {folder}: {reason}") from error
    if not len(examples):
        raise UserError(f"tfds:{name} has no example")
    names = (image_feature, caption_feature)
    key = next((key for key in KEY_FEATURES if key in features), None)
    return RecordSource(
        examples,
        locate=lambda index: f"{split}_{index:08d}",
        parse=functools.partial(_parse, names=names, key_feature=key),
        name=f"tfds:{name}",
        identity=hash_identity("tfds", [MAX_PIXELS, split, *names, *folder.parts[-3:], *files]),
    )


def _parse(
    example: Mapping[str, Any], where: str, names: tuple[str, str], key_feature: str | None
) -> tuple[str, bytes | np.ndarray, tuple[Caption, ...]]:
    key = where if key_feature is None else str(_to_plain(example[key_feature], where))
    image, captions = names
    found = _to_plain(example[captions], key) if captions else ""
    pixels = example[image]
    pixels = pixels if isinstance(pixels, bytes) else np.asarray(pixels)
    return key, pixels, read_captions(found, key)


def _copy(root: AnyPath, path: str, split: str) -> Path:
    """A copy on this machine of what belongs to some splits of ``NAME[/CONFIG[/VERSION]]`` in a bucket.

    TFDS compresses its records, which cannot be read by ranges then.
    """
    splits = re.findall(r"[A-Za-z]\w*", split)
    wanted = ["*"] if "all" in splits else ["*.json", "*.txt", *(f"*-{each}.*" for each in splits)]
    return fetch(root, [f"{path}/{pattern}" for pattern in wanted])


def _find(root: Path, path: str) -> Path:
    """The folder of a prepared version of ``NAME[/CONFIG[/VERSION]]`` below ``root``."""
    folder = root / path
    while folder.is_dir() and not (folder / "dataset_info.json").is_file():
        below = sorted(path for path in folder.glob("[!.]*") if path.is_dir())
        versions = [entry for entry in below if _VERSION.fullmatch(entry.name)]
        if versions:
            folder = max(versions, key=lambda entry: [int(part) for part in entry.name.split(".")])
        elif len(below) == 1:
            folder = below[0]
        else:
            configs = ", ".join(entry.name for entry in below) or "nothing"
            raise UserError(f"tfds:{path} has several configs, name one of them: {configs}")
    if not folder.is_dir():
        raise UserError(
            f"there is no TFDS data set {folder}: prepare it with file_format='array_record', or say "
            "where it lies (config.data.dir)"
        )
    return folder


def _check_features(features: Mapping[str, Any], image: str, caption: str, name: str) -> None:
    known = ", ".join(sorted(features.keys()))
    for key, feature in (("image", image), ("caption", caption)):
        if feature not in features and (feature or key == "image"):
            raise UserError(
                f"tfds:{name} has no feature {feature!r}: set config.data.{key}_feature to one of {known}",
                exit_code=2,
            )
    kind = features[image]
    tensor = isinstance(kind, tfds.features.Tensor) and kind.np_dtype == np.uint8
    if not isinstance(kind, tfds.features.Image) and not tensor:
        raise UserError(
            f"feature {image!r} of tfds:{name} is no Image and no Tensor of uint8: {kind}"
        )
    text = getattr(features[caption], "feature", features[caption]) if caption else None
    if caption and not isinstance(text, tfds.features.Text):
        raise UserError(f"feature {caption!r} of tfds:{name} is no Text or sequence of it: {text}")


def _to_plain(value: Any, key: str) -> Any:
    """Text, whole number or list of texts from TFDS's arrays; raises `Rejected` where not UTF-8."""
    if isinstance(value, list | tuple | np.ndarray) and np.ndim(value):
        return [_to_plain(item, key) for item in value]
    value = value.item() if isinstance(value, np.ndarray | np.generic) else value
    try:
        return value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError as error:
        raise Rejected(key, f"bad caption: not UTF-8 at byte {error.start}") from error
