"""Batches of cached latents: this host's rows of global batch i, as a function of (seed, i)."""

from collections.abc import Callable, Sequence

import numpy as np

from .latents.cache import Cache, CachedRecord, pad_texts
from .order import Order
from .sources.caption_files import choose_caption

Batch = dict[str, np.ndarray]


def latent_batches(
    caches: Sequence[Cache],
    order: Order,
    *,
    rows: Sequence[int],
    batch_size: int,
    seed: int,
    temperature: float = 0.0,
) -> Callable[[int], Batch]:
    """Makes ``batches(i)``, the rows of global batch i that this host holds.

    Args:
      caches: of the same encoders.
      order: over their records, with the same ``batch_size`` and ``seed``.
      rows: numbers of the rows that this host makes, as of `parallel.sharding.local_rows`.
      temperature: see `caption_files.choose_caption`.

    Returns:
      ``batches(i)``: latents [b, h, w, C] float32, text [b, L, D] in the dtype in which it is stored, zero
      behind the last token, and mask [b, L] int32. It may be called from any thread, in any order.
    """
    rows = np.asarray(rows, np.int64)

    def batches(i: int) -> Batch:
        chosen = order.rows(i)
        draws = caption_draws(seed, i, batch_size)[rows]
        return read_rows(caches, chosen.sources[rows], chosen.records[rows], draws, temperature)

    return batches


def caption_draws(seed: int, i: int, batch_size: int) -> np.ndarray:
    """What chooses the captions of global batch i: uniform in [0, 1), [batch_size]."""
    return np.random.RandomState([seed, i % 2**32, i // 2**32]).random_sample(batch_size)


def read_rows(
    caches: Sequence[Cache],
    sources: np.ndarray,
    records: np.ndarray,
    draws: np.ndarray,
    temperature: float = 0.0,
) -> Batch:
    """A batch of the records with these numbers, each of its own cache; captions by ``draws`` in [0, 1).

    Raises:
      UserError: a record cannot be read.
    """
    found: list[CachedRecord | None] = [None] * len(records)
    for number in np.unique(sources):
        places = np.flatnonzero(sources == number)
        read = caches[number].__getitems__([int(records[place]) for place in places])
        for place, record in zip(places, read, strict=True):
            found[place] = record
    texts = [
        record.texts[choose_caption(record.captions, u, temperature)]
        for record, u in zip(found, draws, strict=True)
    ]
    text, mask = pad_texts(texts, caches[0].text_length)
    latents = np.stack([record.latents for record in found]).astype(np.float32)
    return {"latents": latents, "text": text, "mask": mask}
