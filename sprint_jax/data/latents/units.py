"""Units of encoding: ranges of records, from images to shards, each committed as a whole or not at all.

Unit u is the records [u U, (u + 1) U) of a source. Its shards are a function of the source, the encoders and
the options alone, whichever process writes them and however often. They get their names when they are whole
and on disk, and last comes ``units/00012.json``: a unit without that file is done again from its beginning.
"""

import collections
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import grain
import numpy as np

from ...core.errors import UserError
from ...core.files import read_json, write_atomic
from ...core.storage import AnyPath, size_of
from ...encoders.load import Encoders, encode_captions, encode_conditions, encode_images
from ..buckets import read_fitted
from ..rejects import Reject
from ..sources.records import Caption, Rejected, Source
from .cache import SHARDS, CachedRecord, write_shard

UNITS = "units"
IN_FLIGHT = 2  # batches that devices work on while the host goes on
CAPTIONS = 256  # encoded before padding is dropped: features of a whole unit would fill the memory

Size = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Job:
    """An encoding: all that its units depend on, and their folder.

    Attributes:
      folder: of the cache, with `cache.SHARDS` and `UNITS` in it.
      source: of records; its first ``count`` are encoded.
      sizes: (height, width) in pixels that images are cut to.
      dtype: that is stored, bfloat16 or float32.
      unit: records of a unit. A host holds the latents and texts of two in memory.
      batch_size: images at once on this host's devices; threads: that read and decode.
    """

    folder: AnyPath
    source: Source
    count: int
    encoders: Encoders
    sizes: tuple[Size, ...]
    dtype: Any
    unit: int
    batch_size: int
    threads: int

    @property
    def units(self) -> int:
        """Number of units."""
        return -(-self.count // self.unit)

    def records(self, unit: int) -> range:
        """The numbers of a unit's records."""
        return range(unit * self.unit, min((unit + 1) * self.unit, self.count))


class Item(NamedTuple):
    """A record on its way: ``size`` is that of its bucket in pixels, ``array`` the image [H, W, 3] uint8, then
    its latents [h, w, C] float32; ``controls`` the map beside it, if any, then latents of each variant."""

    index: int
    key: str
    size: Size
    captions: tuple[Caption, ...]
    array: np.ndarray
    controls: tuple[np.ndarray, ...] = ()


def unit_path(folder: AnyPath, unit: int) -> AnyPath:
    """The file that commits a unit."""
    return folder / UNITS / f"{unit:05d}.json"


def read_unit(folder: AnyPath, unit: int) -> dict[str, Any] | None:
    """Reads the entry of a unit; None for one that is to be done: not committed, or short of a shard."""
    path = unit_path(folder, unit)
    if not path.is_file():
        return None
    entry = read_json(path)
    for shard in entry["shards"]:
        path = folder / SHARDS / shard["file"]
        if not path.is_file() or size_of(path) != shard["bytes"]:
            return None
    return entry


def encode_units(
    job: Job, units: Sequence[int], progress: Callable[[int], None]
) -> Iterator[dict[str, Any]]:
    """Encodes units one after the other; meanwhile the next one is read and the last one is written.

    ``progress`` is told how many more records are through. Yields the entries that `read_unit` reads, each once
    it is on disk for good. Raises UserError if a file cannot be written, a caption cannot be encoded, or
    latents are not finite.
    """
    indices = np.concatenate([[], *map(job.records, units)]).astype(np.int64)
    ahead = grain.ReadOptions(job.threads, 2 * (job.batch_size + job.threads))
    reading = grain.MapDataset.source(indices).map(lambda index: _load(job, int(index)))
    loaded = iter(reading.to_iter_dataset(ahead))
    with ThreadPoolExecutor(1, thread_name_prefix="write") as writer:
        written = None
        for unit in units:
            results = itertools.islice(loaded, len(job.records(unit)))
            encoded, rejected = _encode_images(job, results, progress)
            texts = _encode_texts(job, encoded)
            if written is not None:
                yield written.result()
            written = writer.submit(_write_unit, job, unit, encoded, rejected, texts)
        if written is not None:
            yield written.result()


def _load(job: Job, index: int) -> Item | Rejected:
    try:
        record = read_fitted(job.source, index, job.sizes)
    except Rejected as rejected:
        return rejected
    controls = () if record.control is None else (record.control,)
    size = record.image.shape[:2]
    return Item(index, record.key, size, record.captions, record.image, controls)


def _encode_images(
    job: Job, loaded: Iterator[Item | Rejected], progress: Callable[[int], None]
) -> tuple[list[Item], list[Rejected]]:
    """Records with latents, those of a bucket together and in the order of the source; and the others."""
    waiting: dict[Size, list[Item]] = {}
    encoded: list[Item] = []
    rejected: list[Rejected] = []
    running: collections.deque = collections.deque()

    def start(batch: list[Item]) -> None:
        # A short batch is filled up: every bucket runs one program.
        filled = batch + batch[-1:] * (job.batch_size - len(batch))
        images = np.stack([item.array for item in filled])
        latents = encode_images(job.encoders.autoencoder, images, job.encoders.sharding)
        running.append((batch, [latents, *_encode_conditions(job, filled, images)]))
        if len(running) > IN_FLIGHT:
            finish()

    def finish() -> None:
        batch, arrays = running.popleft()
        for item, *values in zip(batch, *map(np.asarray, arrays), strict=False):
            if not all(np.isfinite(each).all() for each in values):
                raise UserError(
                    f"latents of {item.key} are not finite: try --config.encode.dtype=float32"
                )
            array, *controls = (each.copy() for each in values)
            encoded.append(item._replace(array=array, controls=tuple(controls)))
        progress(len(batch))

    for item in loaded:
        if isinstance(item, Rejected):
            rejected.append(item)
            progress(1)
            continue
        batch = waiting.setdefault(item.size, [])
        batch.append(item)
        if len(batch) == job.batch_size:
            start(waiting.pop(item.size))
    for batch in waiting.values():
        start(batch)
    while running:
        finish()
    order = {size: number for number, size in enumerate(job.sizes)}
    return sorted(encoded, key=lambda item: (order[item.size], item.index)), rejected


def _encode_conditions(job: Job, batch: list[Item], images: np.ndarray) -> list[Any]:
    """Latents of the conditions of a batch, one array for each variant; none without conditions."""
    conditions = job.encoders.conditions
    if conditions is None:
        return []
    numbers = [np.full(len(batch), number) for number in range(conditions.variants)]
    maps = np.stack([item.controls[0] for item in batch]) if batch[0].controls else None
    return encode_conditions(job.encoders, images, numbers, maps)


def _encode_texts(job: Job, encoded: list[Item]) -> dict[str, np.ndarray]:
    """Kept tokens [n, D] of each caption, in the dtype that is stored; each caption once."""
    captions = list(dict.fromkeys(caption.text for item in encoded for caption in item.captions))
    texts = {}
    for start in range(0, len(captions), CAPTIONS):
        part = captions[start : start + CAPTIONS]
        text, mask = encode_captions(job.encoders.text_encoder, part)
        for caption, tokens, kept in zip(part, text, mask, strict=True):
            texts[caption] = tokens[kept == 1].astype(job.dtype)
    return texts


def _write_unit(
    job: Job, unit: int, encoded: list[Item], rejected: list[Rejected], texts: dict[str, np.ndarray]
) -> dict[str, Any]:
    # Whatever an interrupted run left of the unit goes first.
    unit_path(job.folder, unit).unlink(missing_ok=True)
    for path in (job.folder / SHARDS).glob(f"{unit:05d}-*"):
        path.unlink(missing_ok=True)
    records = (
        CachedRecord(
            item.key,
            item.array.astype(job.dtype),
            item.captions,
            tuple(texts[caption.text] for caption in item.captions),
            tuple(control.astype(job.dtype) for control in item.controls),
        )
        for item in encoded
    )
    entry = {
        "unit": unit,
        "shards": write_shard(job.folder / SHARDS, unit, records),
        "rejected": [Reject(item.key, job.source.name, item.reason)._asdict() for item in rejected],
    }
    entry |= _summarize(encoded)
    write_atomic(unit_path(job.folder, unit), (json.dumps(entry) + "\n").encode())
    return entry


def _summarize(encoded: list[Item]) -> dict[str, Any]:
    """Counts and moments of a unit's records for the manifest, and examples for the preview.

    ``moments`` are the number of latents per channel, and their sums and those of their squares by channel in
    float64; ``examples`` the first two records of each bucket, [number in the unit, number in the source].
    """
    seen: collections.Counter = collections.Counter()
    examples, count, sums, squares = [], 0, 0.0, 0.0
    for number, item in enumerate(encoded):
        seen[item.size] += 1
        if seen[item.size] <= 2:
            examples.append([number, item.index])
        values = item.array.astype(np.float64).reshape(-1, item.array.shape[-1])
        count, sums = count + len(values), sums + values.sum(0)
        squares = squares + (values**2).sum(0)
    moments = {"count": count, "sums": np.ravel(sums).tolist()}
    return {
        "captions": sum(len(item.captions) for item in encoded),
        "without_caption": sum(not any(c.text.strip() for c in item.captions) for item in encoded),
        "moments": moments | {"squares": np.ravel(squares).tolist()},
        "examples": examples,
    }
