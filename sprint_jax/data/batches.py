"""Batches of latents and text: the rows of an order, read from caches, or from images as they are drawn."""

import bisect
import dataclasses
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import chex
import numpy as np

from ..core.errors import UserError
from ..encoders.load import Encoders, encode_captions, encode_images
from .buckets import read_fitted
from .latents.cache import Cache, pad_texts
from .members import Bucket, Buckets
from .order import Order, Rows
from .rejects import RejectLog
from .sources.caption_files import choose_caption
from .sources.records import Caption, Rejected, Source

Batch = dict[str, np.ndarray]
# Makes the batch of some rows; of each row's captions, a draw in [0, 1) chooses one.
Reader = Callable[[Rows, np.ndarray], Batch]


def make_batches(
    order: Order, read: Reader, rows: Sequence[int], *, batch_size: int, seed: int
) -> Callable[[int], Batch]:
    """Makes ``batches(i)``, this host's rows of global batch i; callable from any thread, in any order.

    Args:
      order: with the same ``batch_size`` and ``seed``.
      read: treats each row by itself, or batches would depend on the number of hosts.
      rows: numbers of this host's rows, of `parallel.sharding.local_rows`.

    Returns:
      ``batches(i)``: latents [b, h, w, C] float32, text [b, L, D] and mask [b, L] int32.
    """
    rows = np.asarray(rows, np.int64)

    def batches(i: int) -> Batch:
        chosen = order.rows(i).take(rows)
        draws = np.random.RandomState([seed, i % 2**32, i // 2**32]).random_sample(batch_size)
        batch = read(chosen, draws[rows])
        chex.assert_shape(batch["latents"], (len(rows), *chosen.bucket, None))
        chex.assert_shape(batch["text"], (*batch["mask"].shape, None))
        chex.assert_shape(batch["mask"], (len(rows), None))
        chex.assert_type([batch["latents"], batch["mask"]], [np.float32, np.int32])
        return batch

    return batches


def read_latents(
    caches: Sequence[Cache], temperature: float, rows: Rows, draws: np.ndarray
) -> Batch:
    """Reads a batch of cached latents, of the same encoders; text keeps the dtype in which it is stored.

    With its first two arguments it is a `Reader`. Raises UserError if a record cannot be read.
    """
    found = [None] * len(rows.records)
    for number in np.unique(rows.sources):
        places = np.flatnonzero(rows.sources == number)
        read = caches[number].__getitems__(rows.records[places].tolist())
        for place, record in zip(places, read, strict=True):
            found[place] = record
    texts = [
        record.texts[choose_caption(record.captions, u, temperature)]
        for record, u in zip(found, draws, strict=True)
    ]
    text, mask = pad_texts(texts, caches[0].text_length)
    latents = np.stack([record.latents for record in found]).astype(np.float32)
    return {"latents": latents, "text": text, "mask": mask}


@dataclasses.dataclass(frozen=True)
class ImageReader:
    """A `Reader` of images, encoded as they are drawn: the same numbers as from a cache of their latents.

    A record that cannot be used is replaced by the next usable one of its bucket, on every host and after
    every restart alike.

    Attributes:
      buckets: of each source, the records that may be drawn.
      factor: pixels per latent along a side.
      pool: threads that read and decode images.
      encode_size: images that are encoded at once, a multiple of the encoders' devices.
    """

    sources: Sequence[Source]
    buckets: Sequence[Buckets]
    factor: int
    encoders: Encoders
    log: RejectLog
    pool: ThreadPoolExecutor
    encode_size: int
    temperature: float = 0.0

    def __call__(self, rows: Rows, draws: np.ndarray) -> Batch:
        read = functools.partial(self._read_usable, rows.bucket)
        records = list(self.pool.map(read, rows.sources, rows.records))
        captions = [
            captions[choose_caption(captions, u, self.temperature)].text
            for (_, captions), u in zip(records, draws, strict=True)
        ]
        images, latents = [image for image, _ in records], []
        for start in range(0, len(images), self.encode_size):
            part = images[start : start + self.encode_size]
            # A short last part is filled up: one program, as `encode` has.
            filled = np.stack(part + part[-1:] * (self.encode_size - len(part)))
            encoded = encode_images(self.encoders.autoencoder, filled, self.encoders.sharding)
            latents.append(np.asarray(encoded, np.float32)[: len(part)])
        text, mask = encode_captions(self.encoders.text_encoder, captions)
        # As of a cache: masked tokens are zero.
        kept = [tokens[row == 1] for tokens, row in zip(text, mask, strict=True)]
        text, mask = pad_texts(kept, mask.shape[1])
        return {"latents": np.concatenate(latents), "text": text, "mask": mask}

    def _read_usable(
        self, bucket: Bucket, number: int, record: int
    ) -> tuple[np.ndarray, tuple[Caption, ...]]:
        """Image and captions of a record, or of the next in its bucket that can be used."""
        source, members = self.sources[number], self.buckets[number][bucket]
        size = bucket[0] * self.factor, bucket[1] * self.factor
        index, place = int(record), None
        for _ in range(len(members)):
            try:
                _, image, captions = read_fitted(source, index, [size])
                return image, captions
            except Rejected as rejected:
                self.log.add(rejected, source.name)
            number_at = lambda place: int(members[np.array([place])][0])  # noqa: E731
            if place is None:
                place = bisect.bisect_left(range(len(members)), index, key=number_at)
            place = (place + 1) % len(members)
            index = number_at(place)
        raise UserError(f"{source.name}: none of {len(members)} images of one size can be used")
