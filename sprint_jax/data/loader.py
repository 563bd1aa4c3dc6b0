"""Batches as a pure function of (seed, batch number), for every host its rows, over grain.

Nothing here has a position to save: a run that resumes at step i asks for batch i.
"""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np

from sprint_jax.core.errors import UserError

Batch = dict[str, np.ndarray]


def make_batches(
    source: Sequence[Any],
    transform: Callable[[list[Any]], Batch],
    *,
    batch_size: int,
    seed: int,
    rows: Sequence[int] | None = None,
    shuffle: bool = True,
) -> Callable[[int], Batch]:
    """Makes ``batches(i)``, this host's rows of global batch i.

    Records follow each other in an endless stream of epochs, each shuffled afresh and each with
    every record once; batches are cut from that stream, so one may span two epochs and no record is
    dropped. The stream depends on ``seed`` and ``len(source)`` alone: global batch i is the same
    for any number of hosts, each of which makes the ``rows`` that it holds. grain's shuffle takes
    some 6 us for a record, but longer the fewer records a source has below some thousand: 0.2 ms of
    200, 2 ms of 16.

    Args:
      source: random access by ``len`` and ``[index]``. Where it has ``__getitems__(indices)``, as
        TFDS data sources do, a batch is read at once.
      transform: records of this host -> dict of arrays whose first axis is those records. It must
        treat rows alike and by themselves, or batches would depend on the number of hosts.
      batch_size: rows of the global batch.
      seed: 0 <= seed < 2**32.
      rows: numbers of the rows of each global batch that this host makes, increasing, such as
        `parallel.sharding.local_rows` gives; None for all of them.
      shuffle: False keeps the order of the source.

    Returns:
      ``batches(i)`` for ``i >= 0``. It may be called from any thread and in any order.

    Raises:
      UserError: an empty source, or sizes, host or seed out of range. ``batches`` raises it for a
        transform that returns another number of rows.
    """
    if len(source) == 0:
        raise UserError("the data source is empty: no batch can be made from it")
    if batch_size < 1:
        raise UserError(f"batch_size {batch_size} must be at least 1")
    rows = range(batch_size) if rows is None else [int(row) for row in rows]
    if not rows or not all(0 <= row < batch_size for row in rows):
        raise UserError(f"rows {list(rows)} are not rows of a batch of {batch_size}")
    if not 0 <= seed < 2**32:
        raise UserError(f"data seed {seed} is out of range: use 0 to 2**32 - 1", exit_code=2)

    # The stream is of record numbers, so that the records of a batch can be read in one call.
    order = grain.MapDataset.range(len(source)).seed(seed)
    order = (order.shuffle() if shuffle else order).repeat()

    def batches(i: int) -> Batch:
        if i < 0:
            raise UserError(f"batch number {i} is negative: batches are counted from 0")
        batch = transform(read_records(source, [order[i * batch_size + row] for row in rows]))
        for name, array in batch.items():
            if len(array) != len(rows):
                raise UserError(
                    f"transform made {len(array)} rows of {name!r} from {len(rows)} records"
                )
        return batch

    return batches


def read_records(source: Sequence[Any], indices: Sequence[int]) -> list[Any]:
    """The records with these numbers, read in one call where the source can."""
    if hasattr(source, "__getitems__"):
        return list(source.__getitems__(indices))
    return [source[index] for index in indices]


def encode_online(autoencoder, text_encoder) -> Callable[[list[dict]], Batch]:
    """A transform of records with ``image`` (uint8 [H,W,3], one size) and ``caption`` (str).

    Returns:
      A function to the batch of training: latents [B,h,w,C] float32, text [B,L,Ct] float32 and mask
      [B,L] int32.
    """

    def transform(records: list[dict]) -> Batch:
        pixels = np.stack([record["image"] for record in records]).astype(np.float32) / 127.5 - 1
        text, mask = text_encoder.encode([record["caption"] for record in records])
        return {
            "latents": np.asarray(autoencoder.encode(pixels), np.float32),
            "text": np.asarray(text, np.float32),
            "mask": np.asarray(mask, np.int32),
        }

    return transform


def prefetch(
    batches: Callable[[int], Batch],
    start: int,
    depth: int = 2,
    place: Callable[[Batch], Any] = lambda batch: batch,
) -> Iterator[tuple[int, Any]]:
    """Yields ``(i, place(batches(i)))`` for i = start, start + 1, ... with a thread that works ahead.

    The thread starts with the first ``next`` and ends when the iterator is closed, by ``close()``,
    ``contextlib.closing`` or its going out of use. An error in ``batches`` or ``place`` is raised
    here, after the batches before it.

    Args:
      batches: a function of the batch number that may be called from a thread.
      start: number of the first batch.
      depth: how many batches may wait, at least 1.
      place: puts a batch where it is used, on devices for example, from the same thread. It is called
        only once there is room: no more than ``depth`` placed batches wait, while one more may be
        ready on the host.
    """
    if depth < 1:
        raise UserError(f"prefetch depth {depth} is too small: use at least 1")
    return _prefetch(batches, start, depth, place)


def _prefetch(batches, start: int, depth: int, place):
    waiting: queue.Queue = queue.Queue()
    room = threading.Semaphore(depth)
    stop = threading.Event()

    def work() -> None:
        i = start
        try:
            while True:
                batch = batches(i)
                room.acquire()
                if stop.is_set():
                    return
                waiting.put((i, place(batch), None))
                i += 1
        except BaseException as error:  # whatever it is, it belongs to the consumer
            waiting.put((i, None, error))

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            i, batch, error = waiting.get()
            if error is not None:
                raise error
            room.release()
            yield i, batch
    finally:
        stop.set()
        room.release()  # the thread may be waiting for it
        thread.join()
