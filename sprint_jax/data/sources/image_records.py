"""ArrayRecord files of images: one record for an image, as safetensors, which any language reads.

A record holds three arrays of bytes: ``key`` (UTF-8), ``image`` (the content of an image file, as it was)
and ``captions`` (UTF-8, JSON as `caption_files` describes; empty for none). `write_image_records` writes
such files.
"""

import bisect
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter

from ...core.errors import UserError
from ...core.storage import AnyPath, as_path, fetch, in_bucket
from ..ranged_records import NotReadable, RangedRecords
from .caption_files import captions_beside, dump_captions
from .images import MAX_PIXELS, decode_image, measure_image
from .records import Caption, Record, Rejected, cannot_read, fingerprint, hash_identity

FIELDS = ("key", "image", "captions")
PATTERN = re.compile(r".*\.array_?record(-\d+-of-\d+)?")  # of file names


class RecordSource:
    """Images in records that are read whole, a `records.Source`.

    Args:
      records: random access; a broken one raises RuntimeError, ValueError or OSError.
      locate: gives the place of a record by number, which names it as long as its key is not known.
      parse: gives key, image (a file's content, or pixels) and captions of a record at a place.
    """

    def __init__(
        self,
        records: Sequence[Any],
        *,
        locate: Callable[[int], str],
        parse: Callable[[Any, str], tuple[str, bytes | np.ndarray, tuple[Caption, ...]]],
        name: str,
        identity: str,
    ):
        self.name, self.identity = name, identity
        self._records, self._locate, self._parse = records, locate, parse

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        """Reads the record; raises `Rejected`."""
        key, image, captions = self._read(index)
        return Record(key, decode_image(image, key), captions or (Caption(""),))

    def measure(self, index: int) -> tuple[str, tuple[int, int]]:
        """Reads key and (height, width) from the headers of the image; raises `Rejected`."""
        key, image, _ = self._read(index)
        return key, measure_image(image, key)

    def _read(self, index: int) -> tuple[str, bytes | np.ndarray, tuple[Caption, ...]]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        where = self._locate(index)
        try:
            record = self._records[index]
        except OSError as error:
            raise cannot_read(where, error, where) from error
        except (RuntimeError, ValueError) as error:
            raise Rejected(where, f"broken record: {error}") from error
        return self._parse(record, where)


def open_array_records(paths: Sequence[str | os.PathLike], name: str | None = None) -> RecordSource:
    """Opens ArrayRecord files of images, one after the other, as the source ``name``, by default the paths.

    Raises UserError for a file that is missing or broken, or no record in any of them.
    """
    try:
        files = [_readable(as_path(path).expanduser()) for path in paths]
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error
    name = name or ", ".join(map(str, files))
    starts, total = [], 0
    for file in files:
        starts.append(total)
        try:
            total += len(_open([file]))
        except (RuntimeError, ValueError, OSError) as error:
            raise UserError(f"{file} is not a whole ArrayRecord file: {error}") from error
    if not total:
        raise UserError(f"{name} has no record")

    def locate(index: int) -> str:
        number = bisect.bisect(starts, index) - 1
        return f"{files[number].name}@{index - starts[number]}"

    return RecordSource(
        _open(files),
        locate=locate,
        parse=_parse,
        name=name,
        identity=hash_identity("array_record", [MAX_PIXELS, *map(fingerprint, files)]),
    )


def _readable(file: AnyPath) -> AnyPath:
    """The file; for one in a bucket that is compressed, a copy here."""
    if in_bucket(file):
        try:
            RangedRecords([file])[0]
        except NotReadable:
            return fetch(file)
        except IndexError:
            return file
    return file


def _open(files: Sequence[AnyPath]) -> Sequence[bytes]:
    if all(in_bucket(file) for file in files):
        return RangedRecords(files)
    return ArrayRecordDataSource([str(fetch(file) if in_bucket(file) else file) for file in files])


def _parse(record: bytes, where: str) -> tuple[str, bytes, tuple[Caption, ...]]:
    try:
        arrays = safetensors.numpy.load(record)
        key, image, captions = (arrays[field].tobytes() for field in FIELDS)
        key = key.decode()
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise Rejected(where, f"bad record: not of sprint_jax's image_records: {error}") from error
    return key, image, captions_beside(key, json_bytes=captions or None)


def write_image_records(
    path: str | os.PathLike, images: Iterable[tuple[str, bytes, Sequence[Caption] | str]]
) -> int:
    """Writes an ArrayRecord file that is whole or not there; replaces one that was.

    Args:
      path: of the file, such as ``cats.array_record`` or ``cats.array_record-00000-of-00002``.
      images: of each image its key, the content of its file, and its captions or only caption.

    Returns the number of images. Raises UserError, naming the file or the image.
    """
    path = Path(path).expanduser()
    if not PATTERN.fullmatch(path.name):
        raise UserError(f"{path} must end with .array_record or .array_record-00000-of-00001")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    keys = set()
    try:
        # Groups of one record, so that one is read without others; images are compressed already.
        writer = ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")
        try:
            for key, data, captions in images:
                if not key or key in keys:
                    raise UserError(f"{path}: key {key!r} is empty or comes twice")
                keys.add(key)
                captions = (Caption(captions),) if isinstance(captions, str) else captions
                parts = (key.encode(), bytes(data), dump_captions(captions))
                arrays = [np.frombuffer(part, np.uint8) for part in parts]
                writer.write(safetensors.numpy.save(dict(zip(FIELDS, arrays, strict=True))))
        finally:
            writer.close()
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except ValueError as error:  # half of a surrogate pair, or a weight that is not finite
        raise UserError(f"image {key!r} cannot be written: {error}") from error
    except (OSError, RuntimeError) as error:  # the library reports its errors as RuntimeError
        raise UserError(f"cannot write {path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return len(keys)
