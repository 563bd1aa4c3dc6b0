"""Batches of images that are encoded as they are drawn: the same numbers as from a cache of latents."""

import functools
import hashlib
import os
import platform
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import safetensors.numpy
from tqdm import tqdm

from ..core.errors import UserError
from ..core.files import write_atomic
from ..core.pixels import nearest_size
from ..encoders.load import Encoders, encode_captions, encode_images
from .buckets import read_fitted
from .cached import caption_draws
from .latents.cache import pad_texts
from .order import Bucket, Order
from .rejects import Reject, check_rejects, read_rejects, reject, reject_line
from .sources.caption_files import choose_caption
from .sources.records import Rejected, Source

Batch = dict[str, np.ndarray]
Size = tuple[int, int]

SURVEYED = 4096  # images whose headers a thread reads at a time
SAID = 20  # rejects that are said; all are in the file


class RejectLog:
    """Records that training met and could not use: said once each, added to a file, limited in share.

    Args:
      path: of this process' file, or None. What it names already is not named again.
      limit: see `rejects.check_rejects`.
    """

    def __init__(self, path: Path | None, limit: float):
        self._path, self._limit, self._records = path, limit, 0
        self._named = set(_read_whole(path)) if path is not None else set()
        self._found: dict[tuple[str, str], Reject] = {}
        self._lock = threading.Lock()

    def count(self, records: int) -> None:
        """Counts the records of a source, good or not."""
        self._records += records

    def add(self, rejected: Rejected, source: str) -> None:
        """Notes one. Raises UserError once they are too many."""
        found = reject(rejected, source)
        with self._lock:
            if (source, found.key) in self._found:
                return
            self._found[source, found.key] = found
            if found not in self._named:
                self._name(found)
            if len(self._found) > self._limit * self._records:
                rejects = list(self._found.values())
                path, count = self._path or "no file", self._records
                check_rejects(rejects, count, self._limit, path, total=count)

    def _name(self, found: Reject) -> None:
        if len(self._found) <= SAID:
            more = " (further ones are not said)" if len(self._found) == SAID else ""
            said = f"left out: {found.key} of {found.source}: {found.reason}{more}"
            tqdm.write(said, file=sys.stderr)
        if self._path is not None:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with self._path.open("ab") as file:
                    file.write(reject_line(found))
            except OSError as error:
                raise UserError(f"cannot write {self._path}: {error.strerror}") from error


def _read_whole(path: Path) -> list[Reject]:
    """The rejects of a file, of which a killed process may have left the beginning of a last line."""
    if path.is_file():
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            write_atomic(path, whole)
    return read_rejects(path)


def survey(
    source: Source,
    sizes: Sequence[Size],
    factor: int,
    log: RejectLog,
    *,
    threads: int,
    cache_dir: Path | None = None,
) -> dict[Bucket, np.ndarray]:
    """Finds the bucket of every image from its header; once, if there is a folder to keep the answer in.

    Args:
      sizes: (height, width) in pixels that images are cut to.
      factor: pixels per latent along a side.
      log: gets what cannot be measured.
      threads: that read headers.

    Returns:
      (h, w) of latents -> numbers of records, increasing.
    """
    identity = hashlib.sha256(f"{source.identity} {list(sizes)}".encode()).hexdigest()
    path = cache_dir / f"survey-{identity[:16]}.safetensors" if cache_dir is not None else None
    log.count(len(source))

    def measure(index: int) -> int:
        try:
            _, size = source.measure(index)
        except Rejected as rejected:
            log.add(rejected, source.name)
            return -1
        return sizes.index(nearest_size(*size, sizes))

    def measure_all() -> np.ndarray:
        numbers = np.empty(len(source), np.int16)

        def fill(start: int) -> int:
            stop = min(start + SURVEYED, len(source))
            numbers[start:stop] = [measure(index) for index in range(start, stop)]
            return stop - start

        with (
            ThreadPoolExecutor(threads) as pool,
            tqdm(desc=f"sizes of {source.name}", total=len(source), unit="image", delay=2) as bar,
        ):
            for count in pool.map(fill, range(0, len(source), SURVEYED)):
                bar.update(count)
        return numbers

    if path is not None and path.is_file():
        numbers = safetensors.numpy.load_file(path)["numbers"]
        for index in np.flatnonzero(numbers < 0):  # to be named again
            measure(int(index))
    else:
        numbers = measure_all()
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Several processes may come to this; each writes a file of its own.
            mine = path.with_name(f"{path.name}.{platform.node()}-{os.getpid()}")
            write_atomic(mine, safetensors.numpy.save({"numbers": numbers}))
            mine.replace(path)
    found = {
        (height // factor, width // factor): np.flatnonzero(numbers == number)
        for number, (height, width) in enumerate(sizes)
    }
    return {bucket: found[bucket] for bucket in sorted(found) if len(found[bucket])}


def image_batches(
    sources: Sequence[Source],
    buckets: Sequence[Mapping[Bucket, np.ndarray]],
    encoders: Encoders,
    order: Order,
    log: RejectLog,
    *,
    sizes: Sequence[Size],
    rows: Sequence[int],
    batch_size: int,
    seed: int,
    threads: int,
    encode_size: int,
    temperature: float = 0.0,
) -> Callable[[int], Batch]:
    """Makes ``batches(i)`` as `latents.latent_batches` does, of images.

    A record that cannot be used is replaced by the next usable one of its bucket, on every host and after
    every restart alike.

    Args:
      buckets: of each source, the records that may be drawn, as of `survey`.
      order: over them, with the same ``batch_size`` and ``seed``.
      sizes, log: see `survey`.
      threads: that read and decode images.
      encode_size: images that are encoded at once, a multiple of the encoders' devices.
    """
    rows = np.asarray(rows, np.int64)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="images")

    def batches(i: int) -> Batch:
        chosen = order.rows(i)
        read = functools.partial(read_usable, sources, buckets, chosen.bucket, sizes, log)
        found = list(pool.map(read, chosen.sources[rows], chosen.records[rows]))
        return encode_rows(
            encoders, found, caption_draws(seed, i, batch_size)[rows], temperature, encode_size
        )

    return batches


def encode_rows(encoders: Encoders, records, draws, temperature: float, encode_size: int) -> Batch:
    """Fitted images and captions of one bucket as a batch, a caption of each chosen by ``draws``.

    Images are encoded ``encode_size`` at a time, a short last time filled up: one program, as `encode` has.
    """
    captions = [
        captions[choose_caption(captions, u, temperature)].text
        for (_, captions), u in zip(records, draws, strict=True)
    ]
    images = [image for image, _ in records]
    latents = []
    for start in range(0, len(images), encode_size):
        part = images[start : start + encode_size]
        filled = np.stack(part + part[-1:] * (encode_size - len(part)))
        encoded = encode_images(encoders.autoencoder, filled, encoders.sharding)
        latents.append(np.asarray(encoded, np.float32)[: len(part)])
    text, mask = encode_captions(encoders.text_encoder, captions)
    # As of a cache: what is masked means nothing, and is zero.
    kept = [tokens[row == 1] for tokens, row in zip(text, mask, strict=True)]
    text, mask = pad_texts(kept, mask.shape[1])
    return {"latents": np.concatenate(latents), "text": text, "mask": mask}


def read_usable(sources, buckets, bucket, sizes, log, number: int, record: int):
    """(image, captions) of a record, or of the next in its bucket that can be used."""
    source, members = sources[number], buckets[number][bucket]
    start = int(np.searchsorted(members, record))
    for step in range(len(members)):
        try:
            _, image, captions = read_fitted(
                source, int(members[(start + step) % len(members)]), sizes
            )
            return image, captions
        except Rejected as rejected:
            log.add(rejected, source.name)
    raise UserError(f"{source.name}: none of {len(members)} images of one size can be used")
