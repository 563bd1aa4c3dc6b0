"""Which records make global batch i: one bucket per batch, sources by weight; a function of (seed, i).

A bucket holds images of one size, so that every batch has one shape. Each bucket is an endless stream of
epochs, each shuffled afresh and each with every record once; batches are cut from the stream, so that one
may span two epochs and none is smaller. Epoch e has the batches that begin in a bucket's e-th epoch, in
random order: after as many, every record was drawn once, but for those of a bucket's last, partial batch.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from sprint_jax.core.errors import UserError

Bucket = tuple[int, int]

PERIOD = (
    10_000  # rows after which the pattern of a mixture begins anew; weights count to 1 / PERIOD
)


class Rows(NamedTuple):
    """The rows of a global batch: bucket (height, width), and sources, records [B] int64 by number."""

    bucket: Bucket
    sources: np.ndarray
    records: np.ndarray


class Order(NamedTuple):
    """``rows(i)`` and ``bucket(i)`` of global batch i >= 0, and the ``buckets``, the largest first."""

    rows: Callable[[int], Rows]
    bucket: Callable[[int], Bucket]
    buckets: tuple[Bucket, ...]


def make_order(
    sources: Sequence[Mapping[Bucket, np.ndarray]],
    *,
    batch_size: int,
    seed: int,
    weights: Sequence[float] = (),
) -> Order:
    """The order of records of one source or of a mixture.

    Without weights the records of all sources are one set, each drawn once per epoch. With weights a
    source has its share of the rows, whatever its size, spread evenly, and epochs of its own; within a
    source all records are drawn equally often. Permutations are NumPy's RandomState, whose stream is
    frozen: an order stays the same with every version of every library. (grain's shuffle needs no memory,
    but 1.4 ms for a record of a bucket of 50, and a bucket may be small.)

    Args:
      sources: for each source, numbers of its records by bucket.
      batch_size: rows of a global batch.
      seed: 0 <= seed < 2**32.
      weights: one above 0 for each source, in any unit; or none.

    Raises:
      UserError: no records, or a batch size, seed or weights that cannot be.
    """
    if batch_size < 1:
        raise UserError(f"batch_size {batch_size} must be at least 1")
    if not 0 <= seed < 2**32:
        raise UserError(f"data seed {seed} is out of range: use 0 to 2**32 - 1", exit_code=2)
    counts = [sum(map(len, source.values())) for source in sources]
    if not sum(counts):
        raise UserError("the data source is empty: no batch can be made from it")
    streams = _mixed(sources, counts, weights, seed) if len(weights) else _joined(sources, seed)
    names = sorted(streams, key=lambda bucket: (-streams[bucket].length, bucket))
    lengths = np.array([streams[bucket].length for bucket in names], np.int64)

    def begun(epoch: int) -> np.ndarray:
        """How many batches of each bucket begin before an epoch of it."""
        return -(-epoch * lengths // batch_size)

    @functools.lru_cache(maxsize=4)
    def batches_of(epoch: int) -> np.ndarray:
        """(bucket, its batch) of the batches of an epoch, [count, 2]."""
        first, last = begun(epoch), begun(epoch + 1)
        table = [
            (number, batch)
            for number, (start, stop) in enumerate(zip(first, last, strict=True))
            for batch in range(start, stop)
        ]
        order = np.random.RandomState([seed, epoch]).permutation(len(table))
        return np.array(table, np.int64).reshape(-1, 2)[order]

    def find(i: int) -> tuple[int, int]:
        if i < 0:
            raise UserError(f"batch number {i} is negative: batches are counted from 0")
        # A bucket is at most one batch ahead of its records.
        epoch = max(0, int((i - len(names)) * batch_size // lengths.sum()))
        while begun(epoch + 1).sum() <= i:
            epoch += 1
        number, batch = batches_of(epoch)[i - begun(epoch).sum()]
        return int(number), int(batch)

    def rows(i: int) -> Rows:
        number, batch = find(i)
        positions = np.arange(batch * batch_size, (batch + 1) * batch_size)
        return Rows(names[number], *streams[names[number]].at(positions))

    return Order(rows, lambda i: names[find(i)[0]], tuple(names))


class _Stream(NamedTuple):
    """An endless stream of one bucket: rows in an epoch, and sources, records at positions [n]."""

    length: int
    at: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def _joined(sources, seed: int) -> dict[Bucket, _Stream]:
    streams = {}
    for bucket in sorted({bucket for source in sources for bucket in source}):
        parts = [np.asarray(source.get(bucket, ()), np.int64) for source in sources]
        numbers = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        records = np.concatenate(parts)
        if not len(records):
            continue

        at = functools.partial(_draw_joined, numbers, records, _shuffler(seed, *bucket))
        streams[bucket] = _Stream(len(records), at)
    return streams


def _draw_joined(numbers, records, shuffle, positions):
    index = shuffle(positions, len(records))
    return numbers[index], records[index]


def _mixed(sources, counts: Sequence[int], weights, seed: int) -> dict[Bucket, _Stream]:
    weights = np.asarray(weights, np.float64)
    if len(weights) != len(sources) or not (np.isfinite(weights) & (weights > 0)).all():
        raise UserError(
            f"data weights {tuple(weights.tolist())}: give one number above 0 for each of "
            f"{len(sources)} sources"
        )
    if not all(counts):
        raise UserError(f"source number {counts.index(0)} of the mixture has no records")
    # How often each record of a source is drawn while the mixture draws as many rows as it has records.
    often = weights / weights.sum() * sum(counts) / counts
    streams = {}
    for bucket in sorted({bucket for source in sources for bucket in source}):
        parts = [np.asarray(source.get(bucket, ()), np.int64) for source in sources]
        expected = often * [len(part) for part in parts]
        present = [int(number) for number in np.flatnonzero(expected)]
        if not present:
            continue
        shuffles = [_shuffler(seed, *bucket, number) for number in present]
        at = functools.partial(_draw_mixed, parts, present, _pattern(expected[present]), shuffles)
        streams[bucket] = _Stream(max(1, round(float(expected.sum()))), at)
    return streams


def _draw_mixed(parts, present, pattern, shuffles, positions):
    source, before, per_period = pattern
    period, offset = np.divmod(positions, PERIOD)
    chosen = source[offset]
    within = period * per_period[chosen] + before[offset]
    records = np.empty(len(positions), np.int64)
    for place, number in enumerate(present):
        mine = chosen == place
        records[mine] = parts[number][shuffles[place](within[mine], len(parts[number]))]
    return np.asarray(present)[chosen], records


def _pattern(shares: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The sources of ``PERIOD`` rows in proportion to ``shares``, each spread evenly.

    Returns:
      ``pattern`` [PERIOD], the source of a row; ``before`` [PERIOD], rows of that source before it; and
      rows of each source in all.
    """
    exact = shares / shares.sum() * PERIOD
    count = np.maximum(np.floor(exact).astype(np.int64), 1)  # the rarest source still has a row
    left = PERIOD - count.sum()
    if left >= 0:
        count[np.argsort(count - exact, kind="stable")[:left]] += 1
    else:
        count[np.argmax(count)] += left
    source = np.repeat(np.arange(len(count)), count)
    before = np.concatenate([np.arange(n) for n in count])
    order = np.argsort((before + 0.5) / count[source], kind="stable")
    return source[order], before[order], count


def _shuffler(*seed: int) -> Callable[[np.ndarray, int], np.ndarray]:
    """A function of (positions, length): indices below ``length``, every epoch shuffled afresh."""

    @functools.lru_cache(maxsize=2)
    def permutation(epoch: int, length: int) -> np.ndarray:
        return np.random.RandomState([*seed, epoch]).permutation(length)

    def shuffle(positions: np.ndarray, length: int) -> np.ndarray:
        epochs, offsets = np.divmod(positions, length)
        index = np.empty(len(positions), np.int64)
        for epoch in np.unique(epochs):
            index[epochs == epoch] = permutation(int(epoch), length)[offsets[epochs == epoch]]
        return index

    return shuffle


def hold_out(
    buckets: Mapping[Bucket, np.ndarray], count: int
) -> tuple[dict[Bucket, np.ndarray], dict[Bucket, np.ndarray]]:
    """Parts a source's records into those of training and some ``count`` that are kept from it.

    Each bucket gives its share, rounded, at places that depend on the bucket's length alone.

    Returns:
      ``(training, held_out)``.

    Raises:
      UserError: fewer than one record would be left to train on.
    """
    total = sum(map(len, buckets.values()))
    if count < 0 or (count and count >= total):
        raise UserError(
            f"config.data.holdout: {count} records cannot be held out of {total}", exit_code=2
        )
    training, held_out = {}, {}
    left, records_left = count, total
    for bucket in sorted(buckets):
        records = np.asarray(buckets[bucket], np.int64)
        mine = round(left * len(records) / records_left) if records_left else 0
        left, records_left = left - mine, records_left - len(records)
        places = np.random.RandomState([len(records)]).permutation(len(records))
        held_out[bucket] = np.sort(records[places[:mine]])
        training[bucket] = np.sort(records[places[mine:]])
    return training, held_out
