"""Images and captions in files: a file each in a folder, or members of tar shards."""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from PIL.ContainerIO import ContainerIO

from ...core.storage import (
    AnyPath,
    answers_as_os_errors,
    as_path,
    in_bucket,
    open_file,
    read_range,
)
from .caption_files import captions_beside, parse_json
from .images import decode_image, measure_image
from .records import Caption, Record, Rejected, cannot_read

HEAD = 1 << 16  # bytes of a JPEG in a bucket that are read to measure it


class Span(NamedTuple):
    """A file, or ``size`` bytes of it from ``offset`` on."""

    path: str
    offset: int = 0
    size: int | None = None


class Item(NamedTuple):
    """An image and what belongs to it, or the ``problem`` for which it is refused.

    ``models`` are paths of Sana's files and ``entry`` the image's name in them (see `caption_files`);
    ``captions`` are known where they stand in a metadata.jsonl.
    """

    key: str
    image: Span | None
    text: Span | None = None
    json: Span | None = None
    models: tuple[str, ...] = ()
    entry: str = ""
    captions: tuple[Caption, ...] | None = None
    problem: str | None = None


def open_regular(path: AnyPath, block: int = 1 << 16) -> BinaryIO:
    """Opens a file to read from, if it is a regular one; pipes, devices and sockets are not even opened.

    In a bucket at least ``block`` bytes are asked for at a time. Raises OSError, ENODEV for what is no regular
    file.
    """
    if not in_bucket(path) and not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.ENODEV, "not a regular file", os.fspath(path))
    return open_file(path, block)


def length(file: BinaryIO) -> int:
    """The size of an open file in bytes."""
    size = getattr(file, "size", None)  # of a bucket's
    return os.fstat(file.fileno()).st_size if size is None else size


class FileSource:
    """Images in files, a `records.Source`; see `folders.open_folder` and `tars.open_tars`.

    Args:
      root: the folder to which paths are relative; None if they are not.
      keep_models: Sana's files are about many images, and stay in memory once they are read.
    """

    def __init__(
        self,
        items: Sequence[Item],
        *,
        name: str,
        identity: str,
        root: AnyPath | None = None,
        keep_models: bool = False,
    ):
        self.name, self.identity = name, identity
        self._items, self._root = items, root
        self._values: dict[str, Any] | None = {} if keep_models else None

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Record:
        """Reads the record; raises `Rejected`."""
        item = self._find(index)
        image = decode_image(self._read(item.image, item.key), item.key)
        captions = item.captions
        if captions is None:
            text, json_bytes = (
                None if span is None else self._read(span, item.key)
                for span in (item.text, item.json)
            )
            models = [(Path(path).stem, self._read_model(path, item.key)) for path in item.models]
            captions = captions_beside(item.key, text, json_bytes, models, item.entry)
        return Record(item.key, image, captions or (Caption(""),))

    def keys(self) -> Iterator[str]:
        """The keys of all records, in their order; reads no file."""
        return (item.key for item in self._items)

    def measure(self, index: int) -> tuple[str, tuple[int, int]]:
        """Reads key and (height, width) from the headers of the image; raises `Rejected`."""
        item = self._find(index)
        if in_bucket(path := self._path(item.image)):
            return item.key, self._measure_there(path, item)
        with self._open(item.image, item.key) as (file, size):
            return item.key, measure_image(ContainerIO(file, item.image.offset, size), item.key)

    def _find(self, index: int) -> Item:
        item = self._items[index]
        if item.problem is not None:
            raise Rejected(item.key, item.problem)
        return item

    @contextlib.contextmanager
    def _open(self, span: Span, key: str) -> Iterator[tuple[BinaryIO, int]]:
        """The file of a span, and the bytes to read: of a whole file those of its size, if more would come."""
        try:
            with open_regular(self._path(span)) as file:
                yield file, length(file) if span.size is None else span.size
        except OSError as error:
            raise cannot_read(key, error, span.path) from error

    def _read(self, span: Span, key: str) -> bytes:
        if in_bucket(path := self._path(span)):
            data = self._download(path, span, key)
        else:
            with self._open(span, key) as (file, size):
                file.seek(span.offset)
                data = file.read(size)
        if span.size is not None and len(data) < span.size:
            raise Rejected(key, f"broken tar member: {span.path} has shrunk since it was indexed")
        return data

    def _path(self, span: Span) -> AnyPath:
        return as_path(span.path) if self._root is None else self._root / span.path

    def _download(self, path: AnyPath, span: Span, key: str) -> bytes:
        """A span of a bucket's file in one request."""
        try:
            if span.size is None:
                with answers_as_os_errors(path):
                    return path.read_bytes()
            return read_range(path, span.offset, span.offset + span.size)
        except OSError as error:
            raise cannot_read(key, error, span.path) from error

    def _measure_there(self, path: AnyPath, item: Item) -> tuple[int, int]:
        """Measures an image of a bucket: a JPEG by its beginning if that will do, others read whole."""
        span = item.image
        if span.size is None or span.size > HEAD:
            begin = self._download(path, Span(span.path, span.offset, HEAD), item.key)
            if begin.startswith(
                b"\xff\xd8"
            ):  # what says size and orientation comes before the pixels
                with contextlib.suppress(Rejected):
                    return measure_image(begin, item.key)
        return measure_image(self._download(path, span, item.key), item.key)

    def _read_model(self, path: str, key: str) -> Any:
        if self._values is None:
            return parse_json(self._read(Span(path), key), key, path)
        if path not in self._values:
            self._values[path] = parse_json(self._read(Span(path), key), key, path)
        return self._values[path]


def make_printable(key: str) -> tuple[str, str | None]:
    """A key that can be written anywhere, and the problem with a file name that is not UTF-8, or None."""
    printable = key.encode(errors="backslashreplace").decode()
    return printable, None if printable == key else "bad file name: not UTF-8"
