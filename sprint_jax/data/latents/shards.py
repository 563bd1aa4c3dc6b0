"""Shards of encoded records: written whole, named last."""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from ...core.errors import UserError
from .cache import CachedRecord, describe_shard, pack

# One record to a chunk, for random access; latents do not get smaller by compression.
_WRITER = "group_size:1,uncompressed"


def write_shards(
    folder: Path, unit: int, records: Iterator[CachedRecord], limit: int
) -> list[dict[str, Any]]:
    """Writes the records of a unit, each shard under its name only once it is whole and on disk.

    Args:
      folder: of the shards; they are called ``UNIT-NUMBER.array_record``.
      records: of the unit, those of a bucket next to each other.
      limit: bytes; a shard is cut behind the record with which it passes them.

    Returns:
      For each shard what a manifest says of it: ``file``, ``records``, ``buckets`` (its runs of a bucket, as
      [h, w, count]) and what `cache.describe_shard` gives.

    Raises:
      UserError: a file cannot be written, or does not read back.
    """
    shards = []
    while (first := next(records, None)) is not None:
        name = f"{unit:05d}-{len(shards)}.array_record"
        # Two processes that both take a unit for theirs do not write into one file.
        temporary = folder / f"{name}.{os.getpid()}.tmp"
        buckets = _write_shard(temporary, itertools.chain([first], records), limit)
        described = describe_shard(temporary)
        temporary.replace(folder / name)
        _sync(folder)
        count = sum(count for *_, count in buckets)
        shards.append({"file": name, "records": count, "buckets": buckets} | described)
    return shards


def _write_shard(path: Path, records: Iterator[CachedRecord], limit: int) -> list[list[int]]:
    """Writes records until a shard is full; the lengths of its runs of a bucket, as [h, w, count]."""
    runs: list[list[int]] = []
    size = count = 0
    try:
        writer = ArrayRecordWriter(str(path), _WRITER)
        for record in records:
            data = pack(record)
            writer.write(data)
            height, width = record.latents.shape[:2]
            if not runs or runs[-1][:2] != [height, width]:
                runs.append([height, width, 0])
            runs[-1][2] += 1
            size, count = size + len(data), count + 1
            if size > limit:
                break
        writer.close()
        _sync(path)
        reader = ArrayRecordReader(str(path))
        found = reader.num_records()
        reader.close()
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot write {path}: {error}") from error
    if found != count:
        raise UserError(f"{path} does not read back as it was written; is the disk sound?")
    return runs


def _sync(path: Path) -> None:
    """Forces a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
