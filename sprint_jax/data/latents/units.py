"""Units of encoding: a range of records, from pictures to shards, committed as a whole or not at all.

Unit u is the records [u U, (u + 1) U) of a source. What it writes is a function of the source, the
encoders and the options alone, whichever process does it and however often. Its shards get their names
when they are whole and on disk, and last comes ``units/00012.json``: a unit without that file is still
to be done, and whatever lies there of it is an accident's.
"""

import collections
import contextlib
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ...core.errors import UserError
from ...core.files import write_atomic
from ...encoders.load import Encoders, encode_captions, encode_images
from ..buckets import read_fitted
from ..rejects import reject
from ..sources.records import Caption, Rejected, Source
from .cache import SHARDS, CachedRecord
from .shards import write_shards

UNITS = "units"
_IN_FLIGHT = 2  # batches that devices work on while the host goes on

Size = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Job:
    """All that a unit depends on, and where it goes.

    Attributes:
      folder: that of the cache, with `cache.SHARDS` and `UNITS` in it.
      source: of records, its first ``count`` are encoded.
      sizes: (height, width) in pixels that images are cut to; see `buckets.choose_sizes`.
      dtype: that is stored, bfloat16 or float32.
      unit: records of a unit. A host holds the latents and texts of two in memory.
      batch_size: images at once on this host's devices.
      threads: that read and decode.
      shard_bytes: a shard is cut behind the record with which it passes this.
    """

    folder: Path
    source: Source
    count: int
    encoders: Encoders
    sizes: tuple[Size, ...]
    dtype: Any
    unit: int
    batch_size: int
    threads: int
    shard_bytes: int = 10**9

    @property
    def units(self) -> int:
        """How many there are."""
        return -(-self.count // self.unit)

    def records(self, unit: int) -> range:
        """The numbers of a unit's records."""
        return range(unit * self.unit, min((unit + 1) * self.unit, self.count))


class Image(NamedTuple):
    """A record that is ready to be encoded: ``image`` is uint8 of the size of its bucket."""

    index: int
    key: str
    image: np.ndarray
    captions: tuple[Caption, ...]


class Encoded(NamedTuple):
    """A record with its latents [h, w, C] float32."""

    index: int
    key: str
    size: Size
    captions: tuple[Caption, ...]
    latents: np.ndarray


def unit_path(folder: Path, unit: int) -> Path:
    """The file that commits a unit."""
    return folder / UNITS / f"{unit:05d}.json"


def read_unit(folder: Path, unit: int) -> dict[str, Any] | None:
    """What a unit wrote, None for one that is still to be done: uncommitted, or short of a shard."""
    try:
        entry = json.loads(unit_path(folder, unit).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{unit_path(folder, unit)} cannot be read: {error}; delete it and run again"
        ) from error
    for shard in entry["shards"]:
        path = folder / SHARDS / shard["file"]
        if not path.is_file() or path.stat().st_size != shard["bytes"]:
            return None
    return entry


def encode_units(
    job: Job, units: Sequence[int], progress: Callable[[int], None]
) -> Iterator[dict[str, Any]]:
    """Encodes units one after the other. Pictures of the next one are read meanwhile, and the last one is
    written.

    Args:
      units: their numbers, all still to be done.
      progress: told how many more records are through.

    Yields:
      What `read_unit` gives, each once it is on disk for good.

    Raises:
      UserError: a file cannot be written, or a caption cannot be encoded.
    """
    indices = itertools.chain.from_iterable(job.records(unit) for unit in units)
    ahead = 2 * (job.batch_size + job.threads)
    reading = _read_ahead(lambda index: _load(job, index), indices, job.threads, ahead)
    with reading as loaded, ThreadPoolExecutor(1, thread_name_prefix="write") as writer:
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


def _load(job: Job, index: int) -> Image | Rejected:
    try:
        return Image(index, *read_fitted(job.source, index, job.sizes))
    except Rejected as rejected:
        return rejected


@contextlib.contextmanager
def _read_ahead(function: Callable, items: Iterable, threads: int, depth: int) -> Iterator:
    """``function`` of items in their order, by threads that are at most ``depth`` of them ahead."""
    items, waiting = iter(items), collections.deque()

    def results() -> Iterator:
        while True:
            for item in itertools.islice(items, depth - len(waiting)):
                waiting.append(pool.submit(function, item))
            if not waiting:
                return
            yield waiting.popleft().result()

    pool = ThreadPoolExecutor(threads, thread_name_prefix="read")
    try:
        yield results()
    finally:
        pool.shutdown(cancel_futures=True)


def _encode_images(
    job: Job, loaded: Iterator[Image | Rejected], progress: Callable[[int], None]
) -> tuple[list[Encoded], list[Rejected]]:
    """Records with latents, those of a bucket together and in the order of the source; and the others."""
    waiting: dict[Size, list[Image]] = {}
    encoded: list[Encoded] = []
    rejected: list[Rejected] = []
    running: collections.deque = collections.deque()

    def start(batch: list[Image]) -> None:
        # A short batch is filled up: every bucket runs one program.
        filled = batch + batch[-1:] * (job.batch_size - len(batch))
        images = np.stack([item.image for item in filled])
        latents = encode_images(job.encoders.autoencoder, images, job.encoders.sharding)
        running.append((batch, latents))
        if len(running) > _IN_FLIGHT:
            finish()

    def finish() -> None:
        batch, latents = running.popleft()
        size = batch[0].image.shape[:2]
        for item, values in zip(batch, np.asarray(latents), strict=False):
            encoded.append(Encoded(item.index, item.key, size, item.captions, values.copy()))
        progress(len(batch))

    for item in loaded:
        if isinstance(item, Rejected):
            rejected.append(item)
            progress(1)
            continue
        batch = waiting.setdefault(item.image.shape[:2], [])
        batch.append(item)
        if len(batch) == job.batch_size:
            start(waiting.pop(item.image.shape[:2]))
    for batch in waiting.values():
        start(batch)
    while running:
        finish()
    for item in encoded:
        if not np.isfinite(item.latents).all():
            raise UserError(
                f"latents of {item.key} are not finite: try --config.encode.dtype=float32"
            )
    order = {size: number for number, size in enumerate(job.sizes)}
    return sorted(encoded, key=lambda item: (order[item.size], item.index)), rejected


def _encode_texts(job: Job, encoded: list[Encoded]) -> dict[str, np.ndarray]:
    """Kept tokens [n, D] of each caption, in the dtype that is stored; each caption once."""
    captions = list(dict.fromkeys(_captions(encoded)))
    texts = {}
    # By some hundred: features of padding, and in float32, are not kept for a whole unit.
    for start in range(0, len(captions), 256):
        part = captions[start : start + 256]
        text, mask = encode_captions(job.encoders.text_encoder, part)
        for caption, tokens, kept in zip(part, text, mask, strict=True):
            texts[caption] = tokens[kept == 1].astype(job.dtype)
    return texts


def _captions(encoded: list[Encoded]) -> list[str]:
    return [caption.text for item in encoded for caption in item.captions]


def _write_unit(
    job: Job,
    unit: int,
    encoded: list[Encoded],
    rejected: list[Rejected],
    texts: dict[str, np.ndarray],
) -> dict[str, Any]:
    _clean(job.folder, unit)
    records = (
        CachedRecord(
            item.key,
            item.latents.astype(job.dtype),
            item.captions,
            tuple(texts[caption.text] for caption in item.captions),
        )
        for item in encoded
    )
    shards = write_shards(job.folder / SHARDS, unit, records, job.shard_bytes)
    empty = sum(all(not caption.text.strip() for caption in item.captions) for item in encoded)
    entry = {
        "unit": unit,
        "shards": shards,
        "captions": _captions_by_bucket(encoded),
        "without_caption": empty,
        "rejected": [reject(item, job.source.name)._asdict() for item in rejected],
        "moments": _moments(encoded),
        "examples": _examples(encoded),
    }
    write_atomic(unit_path(job.folder, unit), (json.dumps(entry) + "\n").encode())
    return entry


def _clean(folder: Path, unit: int) -> None:
    """Removes what an interrupted run left of a unit."""
    unit_path(folder, unit).unlink(missing_ok=True)
    for path in (folder / SHARDS).glob(f"{unit:05d}-*"):
        path.unlink(missing_ok=True)


def _captions_by_bucket(encoded: list[Encoded]) -> list[list[int]]:
    """[h, w, captions] of each bucket, by latent size."""
    counts: collections.Counter = collections.Counter()
    for item in encoded:
        counts[item.latents.shape[:2]] += len(item.captions)
    return [[*size, count] for size, count in sorted(counts.items())]


def _moments(encoded: list[Encoded]) -> dict[str, Any]:
    """Latents per channel, and the sums of them and of their squares by channel, in float64."""
    count, sums, squares = 0, 0.0, 0.0
    for item in encoded:
        values = item.latents.astype(np.float64).reshape(-1, item.latents.shape[-1])
        count, sums = count + len(values), sums + values.sum(0)
        squares = squares + (values**2).sum(0)
    return {"count": count, "sums": np.ravel(sums).tolist(), "squares": np.ravel(squares).tolist()}


def _examples(encoded: list[Encoded]) -> list[list[int]]:
    """For a sheet, the first two records of each bucket: [number in the unit, number in the source]."""
    seen: collections.Counter = collections.Counter()
    examples = []
    for number, item in enumerate(encoded):
        seen[item.size] += 1
        if seen[item.size] <= 2:
            examples.append([number, item.index])
    return examples


def process_units(job: Job) -> tuple[list[int], list[dict[str, Any]]]:
    """The units that are this process' to do, and what those of its units that are done wrote.

    Unit u is that of process ``u % n``. The number of processes may change from run to run: what is done is
    done whoever did it.
    """
    mine = range(jax.process_index(), job.units, jax.process_count())
    entries = {unit: read_unit(job.folder, unit) for unit in mine}
    todo = [unit for unit, entry in entries.items() if entry is None]
    return todo, [entry for entry in entries.values() if entry is not None]
