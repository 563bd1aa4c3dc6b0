"""Batches of latents and text: the rows of an order, read from caches, or from images as they are drawn."""

import bisect
import dataclasses
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import chex
import numpy as np

from ..core.errors import UserError
from ..encoders.conditions import MAPS
from ..encoders.load import Encoders, encode_captions, encode_conditions, encode_images
from .buckets import read_fitted
from .latents.cache import Cache, pad_texts
from .members import Bucket, Buckets
from .order import Order, Rows
from .rejects import RejectLog
from .sources.caption_files import choose_caption
from .sources.records import Record, Rejected, Source

Batch = dict[str, np.ndarray]
# Makes the batch of some rows; draws in [0, 1), [2, B], choose a caption and a variant of the condition.
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
      ``batches(i)``: latents [b, h, w, C] float32, text [b, L, D] and mask [b, L] int32; with conditions also
      control [b, h, w, C] float32.
    """
    rows = np.asarray(rows, np.int64)

    def batches(i: int) -> Batch:
        chosen = order.rows(i).take(rows)
        random = np.random.RandomState([seed, i % 2**32, i // 2**32])
        # The first row is as long as it was before there were conditions.
        batch = read(chosen, random.random_sample((2, batch_size))[:, rows])
        chex.assert_shape(batch["latents"], (len(rows), *chosen.bucket, None))
        chex.assert_shape(batch["text"], (*batch["mask"].shape, None))
        chex.assert_shape(batch["mask"], (len(rows), None))
        chex.assert_type([batch["latents"], batch["mask"]], [np.float32, np.int32])
        chex.assert_equal_shape([batch["latents"], batch.get("control", batch["latents"])])
        return batch

    return batches


def read_latents(
    caches: Sequence[Cache],
    temperature: float,
    rows: Rows,
    draws: np.ndarray,
    *,
    control: bool = False,
) -> Batch:
    """Reads a batch of cached latents, of the same encoders; text keeps the dtype in which it is stored.

    With its first two arguments it is a `Reader`; ``control`` adds latents of conditions. Raises UserError if a
    record cannot be read.
    """
    found = [None] * len(rows.records)
    for number in np.unique(rows.sources):
        places = np.flatnonzero(rows.sources == number)
        read = caches[number].__getitems__(rows.records[places].tolist())
        for place, record in zip(places, read, strict=True):
            found[place] = record
    texts = [
        record.texts[choose_caption(record.captions, u, temperature)]
        for record, u in zip(found, draws[0], strict=True)
    ]
    text, mask = pad_texts(texts, caches[0].text_length)
    latents = np.stack([record.latents for record in found]).astype(np.float32)
    batch = {"latents": latents, "text": text, "mask": mask}
    if control:
        chosen = [
            record.controls[int(u * len(record.controls))]
            for record, u in zip(found, draws[1], strict=True)
        ]
        batch["control"] = np.stack(chosen).astype(np.float32)
    return batch


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
            record.captions[choose_caption(record.captions, u, self.temperature)].text
            for record, u in zip(records, draws[0], strict=True)
        ]
        latents, conditions = [], self.encoders.conditions
        for start in range(0, len(records), self.encode_size):
            part = records[start : start + self.encode_size]
            # A short last part is filled up: one program, as `encode` has.
            places = np.minimum(np.arange(self.encode_size), len(part) - 1)
            images = np.stack([part[place].image for place in places])
            arrays = [encode_images(self.encoders.autoencoder, images, self.encoders.sharding)]
            if conditions is not None:
                given = conditions.kind == MAPS
                maps = np.stack([part[place].control for place in places]) if given else None
                numbers = conditions.numbers(draws[1][start + places])
                arrays += encode_conditions(self.encoders, images, [numbers], maps)
            latents.append([np.asarray(array, np.float32)[: len(part)] for array in arrays])
        text, mask = encode_captions(self.encoders.text_encoder, captions)
        # As of a cache: masked tokens are zero.
        kept = [tokens[row == 1] for tokens, row in zip(text, mask, strict=True)]
        text, mask = pad_texts(kept, mask.shape[1])
        arrays = [np.concatenate(parts) for parts in zip(*latents, strict=True)]
        named = dict(zip(("latents", "control"), arrays, strict=False))
        return named | {"text": text, "mask": mask}

    def _read_usable(self, bucket: Bucket, number: int, record: int) -> Record:
        """A record cut to its bucket, or the next one in it that can be used."""
        source, members = self.sources[number], self.buckets[number][bucket]
        size = bucket[0] * self.factor, bucket[1] * self.factor
        index, place = int(record), None
        for _ in range(len(members)):
            try:
                return read_fitted(source, index, [size])
            except Rejected as rejected:
                self.log.add(rejected, source.name)
            number_at = lambda place: int(members[np.array([place])][0])  # noqa: E731
            if place is None:
                place = bisect.bisect_left(range(len(members)), index, key=number_at)
            place = (place + 1) % len(members)
            index = number_at(place)
        raise UserError(f"{source.name}: none of {len(members)} images of one size can be used")
