"""Encoded records on disk: latents and text features, in ArrayRecord shards behind one manifest.

A folder of them, as `sprint_jax.encode` writes it and `open_cache` reads it:

    manifest.json            written last; without it the folder is not complete
    null_text.safetensors    features of the null prompt: text [L, D] float32, mask [L] int32
    shards/00012-0.array_record    records of unit 12, those of one bucket next to each other
    units/00012.json         what unit 12 wrote; the manifest is made of them
    rejected.jsonl, preview.png    for people

A record is a safetensors file of its own, without pickles: ``latents`` [h, w, C] and, for caption k,
``text.k`` [n_k, D], of the tokens alone that the mask keeps. Where conditions were encoded, ``control.v``
[h, w, C] is variant v of them, and the manifest has an entry ``control``; readers of folders without
conditions, and of those that were written before there were any, need not know.
"""

import hashlib
import itertools
import json
import os
import resource
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from ...core.errors import UserError
from ...core.files import read_json
from ...core.storage import AnyPath, as_path, in_bucket, local_output, read_range, size_of
from ..members import Runs
from ..ranged_records import RangedRecords
from ..sources.records import Caption

FORMAT = 1  # of the folder; a reader refuses others
MANIFEST, NULL_TEXT, SHARDS = "manifest.json", "null_text.safetensors", "shards"
TAIL = 1 << 16  # bytes at a shard's end, where its index lies; a copy cut short lacks them
DTYPES = {"BF16": jnp.dtype("bfloat16"), "F32": jnp.dtype("float32")}
# One record to a chunk, for random access; latents do not get smaller by compression.
WRITER = "group_size:1,uncompressed"
OTHER_FILES = 256  # that a training has open beside its shards
THREADS = 32  # that look at shards; disks and networks answer many at once


class CachedRecord(NamedTuple):
    """An encoded image: ``latents`` [h, w, C], which are the autoencoder's times its scaling factor (not
    times sigma_d), its captions, and for each of them the features ``texts[k]`` [n_k, D] of kept tokens; and
    ``controls``, latents [h, w, C] of its condition, one for each variant. All arrays are bfloat16, or all are
    float32."""

    key: str
    latents: np.ndarray
    captions: tuple[Caption, ...]
    texts: tuple[np.ndarray, ...]
    controls: tuple[np.ndarray, ...] = ()


def pack(record: CachedRecord) -> bytes:
    """Writes a record as bytes, the same for the same record."""
    tensors = {"latents": record.latents}
    tensors |= {f"text.{k}": text for k, text in enumerate(record.texts)}
    tensors |= {f"control.{k}": control for k, control in enumerate(record.controls)}
    chex.assert_equal(len(record.texts), len(record.captions))
    words = json.dumps([record.key, record.captions])  # one entry: their order is not kept
    tensors = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    return safetensors.numpy.save(tensors, metadata={"record": words})


def unpack(data: bytes) -> CachedRecord:
    """Reads the record of `pack` in some 20 us whatever its size: arrays are read-only views of ``data``.

    Raises ValueError if that is not a record.
    """
    try:
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(bytes(data[8:start]))
        key, captions = json.loads(header["__metadata__"]["record"])
        captions = tuple(Caption(*caption) for caption in captions)
        texts = (_view(data, start, header[f"text.{k}"]) for k in range(len(captions)))
        variants = itertools.takewhile(header.get, map("control.{}".format, itertools.count()))
        controls = (_view(data, start, header[name]) for name in variants)
        latents = _view(data, start, header["latents"])
        return CachedRecord(key, latents, captions, tuple(texts), tuple(controls))
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"not a cached record: {error!r}") from error


def _view(data: bytes, start: int, entry: dict[str, Any]) -> np.ndarray:
    shape, (first, _) = entry["shape"], entry["data_offsets"]
    count = int(np.prod(shape))
    return np.frombuffer(data, DTYPES[entry["dtype"]], count, start + first).reshape(shape)


def pad_texts(texts: Sequence[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Pads kept tokens [n, D] of some captions: text [B, length, D] in their dtype, mask [B, length] int32."""
    text = np.empty((len(texts), length, texts[0].shape[-1]), texts[0].dtype)
    mask = np.zeros((len(texts), length), np.int32)
    for row, tokens in enumerate(texts):
        text[row, : len(tokens)] = tokens
        text[row, len(tokens) :] = 0
        mask[row, : len(tokens)] = 1
    return text, mask


class _Part(NamedTuple):
    """A whole shard for ArrayRecordDataSource, which then need not open the file to count its records."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


class Cache:
    """Random access to the records of a folder, from any thread. Open one with `open_cache`.

    Attributes:
      buckets: (h, w) of latents -> numbers of its records, increasing.
      null_text: features [L, D] float32 of the null prompt, and null_mask [L] int32.
      text_length: L, the most tokens that a caption has.
      identity: hash of the encoders; caches with the same one may be mixed.
      control: the conditions that records have (`encoders.conditions.Conditions.identity`) and their number as
        ``variants``; None for none.
    """

    def __init__(self, folder: AnyPath, manifest: dict[str, Any], null: dict[str, np.ndarray]):
        self.folder, self.manifest = folder, manifest
        self.null_text, self.null_mask = null["text"], null["mask"]
        self.text_length = len(self.null_mask)
        self.identity: str = manifest["identity"]
        self.control: dict[str, Any] | None = manifest.get("control")
        parts, runs, first = [], {}, 0
        for shard in manifest["shards"]:
            path = folder / SHARDS / shard["file"]
            parts.append(_Part(str(path), 0, shard["records"], shard["records"]))
            for height, width, count in shard["buckets"]:
                runs.setdefault((height, width), []).append((first, count))
                first += count
        self.buckets = {size: Runs(*np.transpose(runs[size])) for size in sorted(runs)}
        if in_bucket(folder):
            paths = [folder / SHARDS / shard["file"] for shard in manifest["shards"]]
            self._records = RangedRecords(paths, [shard["records"] for shard in manifest["shards"]])
        else:
            self._records = ArrayRecordDataSource(parts)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> CachedRecord:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[CachedRecord]:
        """Reads the records of these numbers in one call; raises UserError if one cannot be read."""
        try:
            return [unpack(data) for data in self._records.__getitems__(indices)]
        except (ValueError, RuntimeError, OSError) as error:
            raise UserError(
                f"{self.folder}: records {min(indices)} to {max(indices)} cannot be read: {error}"
            ) from error


def open_cache(folder: str | AnyPath) -> Cache:
    """Opens a folder that `encode` wrote, if it is all there.

    Every shard's size and last bytes are compared with the manifest: a copy that was interrupted is refused. A
    record that is damaged further inside is found by its checksum when it is read; in a bucket that is the
    provider's to see to.

    Raises:
      UserError: no manifest, one of another format, or a shard that is missing, cut short, changed, or not
        of this folder.
    """
    folder = as_path(folder)
    if folder.is_dir() and not (folder / MANIFEST).is_file():
        raise UserError(
            f"{folder} is not a whole folder of latents ({MANIFEST} is missing): let sprint_jax.encode end, or "
            "copy it again"
        )
    manifest = read_json(folder / MANIFEST)
    if manifest.get("format") != FORMAT:
        found = f"is of format {manifest.get('format')}, this version reads {FORMAT}"
        raise UserError(f"{folder / MANIFEST} {found}: encode again")
    shards = {shard["file"]: shard for shard in manifest["shards"]}
    found = {path.name for path in (folder / SHARDS).glob("*.array_record")}
    if foreign := sorted(found - set(shards)):
        raise UserError(f"{folder / SHARDS / foreign[0]} is not of this folder: take it away")

    def check(shard: dict[str, Any]) -> None:
        path = folder / SHARDS / shard["file"]
        if describe_end(path) != {key: shard[key] for key in ("bytes", "tail")}:
            raise UserError(
                f"{path} is missing, cut short or not the shard that was written: copy it again"
            )

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(check, shards.values()))
    if not in_bucket(folder):
        _allow_open_files(len(shards))
    path = folder / NULL_TEXT
    if not path.is_file() or hash_file(path) != manifest["null_text_sha256"]:
        raise UserError(f"{path} is missing or not the one that was written: copy it again")
    return Cache(folder, manifest, safetensors.numpy.load(path.read_bytes()))


def check_mixture(caches: Sequence[Cache], control: str) -> dict[str, Any] | None:
    """Refuses folders of different encoders, or without the conditions that are asked for.

    Args:
      control: the kind of conditions, '' for none.

    Returns:
      The identity of the conditions, without the number of variants, in which folders may differ.
    """
    first, found = caches[0], []
    for cache in caches:
        if (cache.identity, cache.text_length) != (first.identity, first.text_length):
            raise UserError(
                f"{cache.folder} and {first.folder} are of different encoders: their latents cannot be mixed"
            )
        has = cache.control or {"kind": "none"}
        if control and has["kind"] != control:
            raise UserError(
                f"config.data.control is '{control}', and the conditions in {cache.folder} are {has['kind']}: "
                f"encode with --config.data.control={control}"
            )
        found.append({name: value for name, value in has.items() if name != "variants"})
        if control and found[-1] != found[0]:
            raise UserError(
                f"{cache.folder} and {first.folder} have conditions of other weights or thicknesses: they "
                "cannot be mixed"
            )
    return found[0] if control else None


def _allow_open_files(count: int) -> None:
    """Lets this process have as many files open as the system allows, as a reader keeps its shards open.

    Raises UserError if that is not enough for ``count`` shards and the other files of a training.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = soft + count if hard == resource.RLIM_INFINITY else hard
    if soft not in (limit, resource.RLIM_INFINITY):
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    if count + OTHER_FILES > limit:
        raise UserError(
            f"{count} shards cannot be open at once: this system allows {hard} files (ulimit -Hn); raise that, "
            "or encode with a larger config.encode.unit"
        )


def write_shard(
    folder: AnyPath, unit: int, records: Iterable[CachedRecord]
) -> list[dict[str, Any]]:
    """Writes the records of a unit, those of a bucket together, as a shard that is whole or not there.

    Returns:
      The shard's entry in the manifest: ``file``, ``records``, ``buckets`` (its runs of a bucket, as
      [h, w, count]) and those of `describe_end`; no entry for no records.

    Raises:
      UserError: the file cannot be written, or does not read back.
    """
    with local_output(folder) as local:
        return _write_shard(local / f"{unit:05d}-0.array_record", records)


def _write_shard(path: Path, records: Iterable[CachedRecord]) -> list[dict[str, Any]]:
    # Two processes that both take a unit for theirs do not write into one file.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    runs: list[list[int]] = []
    try:
        writer = ArrayRecordWriter(str(temporary), WRITER)
        for record in records:
            writer.write(pack(record))
            height, width = record.latents.shape[:2]
            if not runs or runs[-1][:2] != [height, width]:
                runs.append([height, width, 0])
            runs[-1][2] += 1
        writer.close()
        _sync(temporary)
        count = sum(run[2] for run in runs)
        reader = ArrayRecordReader(str(temporary))
        if reader.num_records() != count:
            raise UserError(f"{temporary} does not read back as it was written; is the disk sound?")
        reader.close()
        described = describe_end(temporary)
        if not count:
            temporary.unlink()
            return []
        temporary.replace(path)
        _sync(path.parent)
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot write {path}: {error}") from error
    return [{"file": path.name, "records": count, "buckets": runs} | described]


def describe_end(path: AnyPath) -> dict[str, int]:
    """Returns the number of bytes of a shard, and a CRC-32 of the last `TAIL` of them; zeros without a file."""
    try:
        size = size_of(path)
        return {"bytes": size, "tail": zlib.crc32(read_range(path, max(0, size - TAIL), size))}
    except FileNotFoundError:
        return {"bytes": 0, "tail": 0}


def hash_file(path: AnyPath) -> str:
    """Hashes a small file: sha256, 64 hex digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _sync(path: Path) -> None:
    """Forces a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
