"""TFDS data sets by name, read without TensorFlow and without the code that made them."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from ...core.errors import UserError
from ...digits.dataset import Digits, open_digits
from .caption_files import read_captions
from .images import MAX_PIXELS, decode_image, flatten_pixels, measure_image
from .records import Caption, Record, Rejected, fingerprint, hash_identity

KEY_FEATURES = ("key", "id")
_VERSION = re.compile(r"\d+\.\d+\.\d+")


class TfdsSource:
    """The examples of a split in its order; see `open_tfds`."""

    def __init__(
        self,
        examples: Any,
        features: Mapping[str, Any],
        feature_names: tuple[str, str],
        split: str,
        name: str,
        identity: str,
        max_pixels: int,
    ):
        self.name, self.identity = name, identity
        self._examples, self._split, self._max_pixels = examples, split, max_pixels
        self._image, self._caption = feature_names
        self._key = next((name for name in KEY_FEATURES if name in features), None)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Record:
        """The record; raises `Rejected`."""
        example, key = self._read(index)
        value = example[self._image]
        if isinstance(value, bytes):
            image = decode_image(value, key, max_pixels=self._max_pixels)
        else:
            image = flatten_pixels(np.asarray(value), key)
        said = _plain(example[self._caption], key) if self._caption else ""
        return Record(key, image, read_captions(said, key) or (Caption(""),))

    def measure(self, index: int) -> tuple[str, tuple[int, int]]:
        """Key and (height, width); raises `Rejected`."""
        example, key = self._read(index)
        value = example[self._image]
        if isinstance(value, bytes):
            return key, measure_image(value, key, max_pixels=self._max_pixels)
        return key, flatten_pixels(np.asarray(value), key).shape[:2]

    def _read(self, index: int) -> tuple[dict[str, Any], str]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        where = f"{self._split}_{index:08d}"
        try:
            example = self._examples[index]
        except (RuntimeError, ValueError, OSError) as error:
            raise Rejected(where, f"broken record: {' '.join(str(error).split())}") from error
        return example, where if self._key is None else str(_plain(example[self._key], where))


def open_tfds(
    name: str,
    *,
    data_dir: str | os.PathLike,
    image_feature: str = "image",
    caption_feature: str = "caption",
    max_pixels: int = MAX_PIXELS,
) -> TfdsSource:
    """Opens a prepared data set that lies below ``data_dir``; ``digits`` is written there first if missing.

    An ``Image`` feature is read as the bytes it was made from and decoded as files are; a ``Tensor`` is
    taken as it is, uint8 [H, W], or [H, W, C] with C of 1, 3 or 4. Captions are a ``Text`` or a sequence
    of them. Keys are those of a feature ``key`` or ``id`` where there is one, else the split and the
    number in it, such as ``train_00000012``.

    Args:
      name: ``NAME[/CONFIG[/VERSION]][:SPLIT]``. An only config need not be named; the split, ``train`` if
        left out, may be a part, such as ``train[:80%]``. The newest version counts.
      data_dir: the data_dir that the set was prepared with.
      image_feature: name of a feature at the top.
      caption_feature: likewise; empty for none.
      max_pixels: see `images.decode_image`.

    Raises:
      UserError: no such set, config, split or feature, or one that was prepared in a format without
        random access.
    """
    path, _, split = name.partition(":")
    split = split or "train"
    root = Path(data_dir).expanduser().absolute()
    if path.split("/")[0] == Digits.name and not (root / path).is_dir():
        open_digits(root, (path.split("/") + ["full"])[1], "train")  # writes all splits
    folder = _find(root, path)
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
        raise UserError(f"cannot open tfds:{name} of {folder}: {_line(error)}") from error
    if not len(examples):
        raise UserError(f"tfds:{name} has no example")
    names = (image_feature, caption_feature)
    identity = hash_identity("tfds", [max_pixels, split, *names, *folder.parts[-3:], *files])
    return TfdsSource(examples, features, names, split, f"tfds:{name}", identity, max_pixels)


def _find(root: Path, path: str) -> Path:
    """The folder of a prepared version of ``NAME[/CONFIG[/VERSION]]`` below ``root``."""
    folder = root / path
    while folder.is_dir() and not (folder / "dataset_info.json").is_file():
        below = sorted(entry for entry in folder.iterdir() if entry.is_dir())
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
    if not isinstance(features, Mapping | tfds.features.FeaturesDict):
        raise UserError(f"tfds:{name} has no features with names")
    known = ", ".join(sorted(features.keys()))
    for what, feature in (("image", image), ("caption", caption)):
        if feature not in features and (feature or what == "image"):
            raise UserError(
                f"tfds:{name} has no feature {feature!r}: set config.data.{what}_feature to one of {known}",
                exit_code=2,
            )
    kind = features[image]
    tensor = isinstance(kind, tfds.features.Tensor) and kind.np_dtype == np.uint8
    if not isinstance(kind, tfds.features.Image) and not tensor:
        raise UserError(
            f"feature {image!r} of tfds:{name} is no Image and no Tensor of uint8: {kind}"
        )
    texts = features[caption] if caption else tfds.features.Text()
    inner = getattr(texts, "feature", texts)  # of a Sequence
    if not isinstance(inner, tfds.features.Text):
        raise UserError(
            f"feature {caption!r} of tfds:{name} is no Text and no sequence of it: {texts}"
        )


def _plain(value: Any, key: str) -> Any:
    """Text, whole number or list of texts from what TFDS gives; raises `Rejected` where not UTF-8."""
    if isinstance(value, list | tuple | np.ndarray) and np.ndim(value):
        return [_plain(item, key) for item in value]
    value = value.item() if isinstance(value, np.ndarray | np.generic) else value
    try:
        return value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError as error:
        raise Rejected(key, f"bad caption: not UTF-8 at byte {error.start}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
