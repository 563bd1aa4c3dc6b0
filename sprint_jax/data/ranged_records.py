"""ArrayRecord files read by ranges of bytes, as buckets give them; the library itself opens local files alone.

An ArrayRecord file is one of Riegeli/records: chunks, interrupted by a header of 24 bytes at every 64 KiB. Its
last 64 KiB hold the place of a chunk that lists the places of all others. Sources: the format's specification
(google/riegeli, doc/riegeli_records_file_format.md) and ArrayRecord's layout.proto.
"""

import functools
import itertools
import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ..core.storage import AnyPath, read_range, read_ranges, size_of

BLOCK, BLOCK_HEADER, CHUNK_HEADER = 1 << 16, 24, 40
MAGIC = 0x71930E704FDAE05E  # of the end of the file
OPEN_INDICES = 4096  # files whose lists of places stay in memory
READ_AHEAD = 1 << 20  # bytes before the end that are read with it: most lists lie there


class NotReadable(ValueError):
    """A file that is damaged, or compressed; the message says which."""


class Index(NamedTuple):
    """The places of a file's chunks: ``starts`` and the last end, and the ``first`` record of each."""

    starts: np.ndarray
    first: np.ndarray


class RangedRecords:
    """Random access to the records of ArrayRecord files that were written without compression.

    Args:
      paths: of the files.
      counts: their numbers of records; None to read these from the files.

    Raises:
      NotReadable, OSError: as does every access.
    """

    def __init__(self, paths: Sequence[AnyPath], counts: Sequence[int] | None = None):
        self._paths = list(paths)
        self._index = functools.lru_cache(OPEN_INDICES)(lambda number: read_index(paths[number]))
        if counts is None:
            counts = [int(self._index(number).first[-1]) for number in range(len(paths))]
        self._ends = np.cumsum(counts, dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> bytes:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[bytes]:
        """The records of these numbers; all requests are on their way at once."""
        files = np.searchsorted(self._ends, indices, side="right")
        paths, starts, stops, inside = [], [], [], []
        for number, file in zip(indices, files.tolist(), strict=True):
            index = self._index(file)
            local = number - (int(self._ends[file - 1]) if file else 0)
            chunk = int(np.searchsorted(index.first, local, side="right")) - 1
            paths.append(self._paths[file])
            starts.append(int(index.starts[chunk]))
            stops.append(int(index.starts[chunk + 1]))
            inside.append(local - int(index.first[chunk]))
        contents = read_ranges(paths, starts, stops)
        return [
            _records(path, start, content)[place]
            for path, start, content, place in zip(paths, starts, contents, inside, strict=True)
        ]


def read_index(path: AnyPath) -> Index:
    """The places of a file's records; raises `NotReadable` or OSError."""
    size = size_of(path)
    if size < 2 * BLOCK or size % BLOCK:
        raise NotReadable(f"{path} is no whole ArrayRecord file")
    begin = max(0, size - BLOCK - READ_AHEAD)
    tail = read_range(path, begin, size)
    end = dict(_fields(_records(path, size - BLOCK, tail[-BLOCK:])[0]))
    footer = end.get(1, size)
    if end.get(2) != MAGIC or not 0 < footer < size - BLOCK:
        raise NotReadable(f"{path} is no whole ArrayRecord file")
    content = tail[footer - begin :] if footer >= begin else read_range(path, footer, size)
    _, *entries = _records(path, footer, content)
    chunks = [dict(_fields(entry)) for entry in entries]
    counts = [chunk.get(3, 0) for chunk in chunks]
    starts = [*(chunk.get(1, 0) for chunk in chunks), footer]
    return Index(np.array(starts, np.int64), np.array([0, *itertools.accumulate(counts)], np.int64))


def _records(path: AnyPath, start: int, content: bytes) -> list[bytes]:
    """The records of the chunk that begins a file's ``content`` from byte ``start`` on."""
    if len(content) < CHUNK_HEADER:
        raise NotReadable(f"{path}: the chunk at byte {start} is cut short")
    plain = _without_block_headers(start, content)
    _, size, _, kind, _ = struct.unpack("<5Q", plain[:CHUNK_HEADER])
    data, count = plain[CHUNK_HEADER : CHUNK_HEADER + size], kind >> 8
    if kind & 0xFF != ord("r") or len(data) < max(size, 1):
        raise NotReadable(f"{path}: the chunk at byte {start} is damaged, or transposed")
    if data[0]:
        raise NotReadable(f"{path} is compressed")
    length, at = _varint(data, 1)
    values, sizes = at + length, []
    for _ in range(count):
        size, at = _varint(data, at)
        sizes.append(size)
    ends = [values + end for end in itertools.accumulate(sizes, initial=0)]
    if at != values or ends[-1] != len(data):
        raise NotReadable(f"{path}: the chunk at byte {start} is damaged")
    return [data[a:b] for a, b in itertools.pairwise(ends)]


def _without_block_headers(start: int, content: bytes) -> bytes:
    parts, at = [], 0
    while at < len(content):
        inside = (start + at) % BLOCK
        at += max(0, BLOCK_HEADER - inside)
        stop = at + BLOCK - (start + at) % BLOCK
        parts.append(content[at:stop])
        at = stop
    return b"".join(parts)


def _fields(message: bytes) -> Iterator[tuple[int, int]]:
    """Numbers and values of the integers in a protocol buffer."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        if tag & 7 == 2:  # a message or string, passed over
            length, at = _varint(message, at)
            at += length
        elif tag & 7 == 0:
            value, at = _varint(message, at)
            yield tag >> 3, value
        else:
            raise NotReadable("a list of chunks is damaged")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data) and shift < 70:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
    raise NotReadable("a number is cut short")
