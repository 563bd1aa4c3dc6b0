"""Batches of images that are encoded as they are drawn: the same numbers as from a cache of latents."""

import functools
import hashlib
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import safetensors.numpy
from tqdm import tqdm

from ..atomic import write_atomic
from ..errors import UserError
from ..pictures import nearest_size
from .buckets import read_fitted
from .cache import pad_texts
from .caption_files import choose_caption
from .encoders import Encoders, encode_captions, encode_images
from .latents import caption_draws
from .order import Bucket, Order
from .records import Rejected, Source
from .rejects import Reject, check_rejects, reject, write_rejects

Batch = dict[str, np.ndarray]
Size = tuple[int, int]


class RejectLog:
    """Records that training met and could not use: said once each, written to a file, limited in share.

    Args:
      path: of rejected.jsonl, or None where another process writes it.
      limit: see `rejects.check_rejects`.
    """

    def __init__(self, path: Path | None, limit: float):
        self._path, self._limit = path, limit
        self._found: dict[tuple[str, str], Reject] = {}
        self._seen = 0
        self._lock = threading.Lock()

    def seen(self, count: int) -> None:
        """Counts records that were looked at."""
        with self._lock:
            self._seen += count

    def add(self, rejected: Rejected, source: str) -> None:
        """Notes one. Raises UserError once they are too many."""
        with self._lock:
            if (source, rejected.key) in self._found:
                return
            self._found[source, rejected.key] = reject(rejected, source)
            said = f"left out: {rejected.key} of {source}: {rejected.reason}"
            tqdm.write(said, file=sys.stderr)
            rejects = list(self._found.values())
            if self._path is not None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                write_rejects(self._path, rejects)
            check_rejects(rejects, self._seen, self._limit, self._path or "rejected.jsonl")


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

    def measure(index: int) -> int:
        try:
            _, size = source.measure(index)
        except Rejected as rejected:
            log.add(rejected, source.name)
            return -1
        return sizes.index(nearest_size(*size, sizes))

    def measure_all() -> np.ndarray:
        log.seen(len(source))
        with ThreadPoolExecutor(threads) as pool:
            found = pool.map(measure, range(len(source)), chunksize=256)
            bar = tqdm(found, f"sizes of {source.name}", len(source), unit="image", delay=2.0)
            return np.fromiter(bar, np.int16, len(source))

    if path is not None and path.is_file():
        numbers = safetensors.numpy.load_file(path)["numbers"]
        log.seen(len(source))
        for index in np.flatnonzero(numbers < 0):  # to be named again
            measure(int(index))
    else:
        numbers = measure_all()
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, safetensors.numpy.save({"numbers": numbers}))
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
    """
    rows = np.asarray(rows, np.int64)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="images")

    def batches(i: int) -> Batch:
        chosen = order.rows(i)
        read = functools.partial(_read_usable, sources, buckets, chosen.bucket, sizes, log)
        found = list(pool.map(read, chosen.sources[rows], chosen.records[rows]))
        return encode_rows(encoders, found, caption_draws(seed, i, batch_size)[rows], temperature)

    return batches


def encode_rows(encoders: Encoders, records, draws, temperature: float) -> Batch:
    """Fitted images and captions of one bucket as a batch, a caption of each chosen by ``draws``."""
    images = np.stack([image for image, _ in records])
    captions = [
        captions[choose_caption(captions, u, temperature)].text
        for (_, captions), u in zip(records, draws, strict=True)
    ]
    ways = encoders.sharding.mesh.size if encoders.sharding is not None else 1
    filled = np.concatenate([images, images[-1:].repeat(-len(images) % ways, axis=0)])
    latents = encode_images(encoders.autoencoder, filled, encoders.sharding)
    text, mask = encode_captions(encoders.text_encoder, captions)
    # As of a cache: what is masked means nothing, and is zero.
    kept = [tokens[row == 1] for tokens, row in zip(text, mask, strict=True)]
    text, mask = pad_texts(kept, mask.shape[1])
    return {"latents": np.asarray(latents, np.float32)[: len(images)], "text": text, "mask": mask}


def _read_usable(sources, buckets, bucket, sizes, log, number: int, record: int):
    """(image, captions) of a record, or of the next in its bucket that can be used."""
    source, members = sources[number], buckets[number][bucket]
    start = int(np.searchsorted(members, record))
    log.seen(1)
    for step in range(len(members)):
        try:
            _, image, captions = read_fitted(
                source, int(members[(start + step) % len(members)]), sizes
            )
            return image, captions
        except Rejected as rejected:
            log.add(rejected, source.name)
    raise UserError(f"{source.name}: none of {len(members)} images of one size can be used")
