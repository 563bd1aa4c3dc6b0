"""Order of records: those that make global batch i, as a function of (seed, i).

A bucket holds records of one size, and a batch is of one bucket, so that every batch has one shape. A bucket
is an endless stream of epochs, each with every record once, in an order of its own; batches are cut from the
stream, so one may span two epochs and none is smaller. Where there are several buckets, epoch e has the batches
that begin in a bucket's e-th epoch, in random order: after them every record was drawn once, except those of a
bucket's last, partial batch. Nothing has a position to save: a run that resumes at step i asks for batch i.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import grain
import numpy as np

from ..core.errors import UserError

Bucket = tuple[int, int]
Part = tuple[np.ndarray, np.ndarray]

# Rows after which the pattern of a mixture repeats; its weights are rounded to 1 / PERIOD.
PERIOD = 10_000


class Rows(NamedTuple):
    """Rows of a batch: their bucket (height, width); source numbers and record numbers, both [B] int64."""

    bucket: Bucket
    sources: np.ndarray
    records: np.ndarray

    def take(self, rows: np.ndarray) -> "Rows":
        """Some of the rows, by number."""
        return Rows(self.bucket, self.sources[rows], self.records[rows])


class Order(NamedTuple):
    """``rows(i)`` of global batch i >= 0, and the ``buckets``, the largest first."""

    rows: Callable[[int], Rows]
    buckets: tuple[Bucket, ...]


class _Stream(NamedTuple):
    """An endless stream of one bucket: rows in an epoch, and sources, records at positions [n]."""

    length: int
    at: Callable[[np.ndarray], Part]


def make_single_order(count: int, bucket: Bucket, *, batch_size: int, seed: int) -> Order:
    """Returns the order of one source with one bucket of ``count`` records; ``0 <= seed < 2**32``.

    grain's shuffle needs no memory, so that a source may be of any length. It takes 6 us for a record, but
    2 ms in a bucket of 16, and mixtures have small buckets: `make_order` permutes with NumPy instead.

    Raises:
      UserError: no records, or a batch size or seed out of range.
    """
    _check(count, batch_size, seed)
    stream = grain.MapDataset.range(count).seed(seed).shuffle().repeat()

    def rows(i: int) -> Rows:
        records = [stream[i * batch_size + row] for row in range(batch_size)]
        return Rows(bucket, np.zeros(batch_size, np.int64), np.array(records, np.int64))

    return Order(rows, (bucket,))


def make_order(
    sources: Sequence[Mapping[Bucket, np.ndarray]],
    *,
    batch_size: int,
    seed: int,
    weights: Sequence[float] = (),
) -> Order:
    """Returns the order of the records of one source, or of a mixture, in buckets.

    Without weights the records of all sources are one set, each drawn once per epoch. With weights a
    source has its share of the rows, whatever its size, spread evenly, and epochs of its own; within a
    source all records are drawn equally often. Permutations are NumPy's RandomState, whose stream is
    frozen: an order stays the same with every version of every library.

    Args:
      sources: for each source, numbers of its records by bucket.
      weights: one above 0 for each source, in any unit; or none.

    Raises:
      UserError: no records, or a batch size, seed or weights that cannot be.
    """
    _check(sum(len(records) for source in sources for records in source.values()), batch_size, seed)
    streams = _make_streams(sources, weights, seed)
    names = sorted(streams, key=lambda bucket: (-streams[bucket].length, bucket))
    lengths = np.array([streams[bucket].length for bucket in names], np.int64)

    def begun(epoch: int) -> np.ndarray:
        """Numbers of batches of each bucket that begin before an epoch of it."""
        return -(-epoch * lengths // batch_size)

    @functools.lru_cache(maxsize=4)
    def batches_of(epoch: int) -> np.ndarray:
        """(bucket, its batch) of the batches of an epoch, [count, 2]."""
        first, last = begun(epoch), begun(epoch + 1)
        table = [(k, batch) for k in range(len(names)) for batch in range(first[k], last[k])]
        order = np.random.RandomState([seed, epoch]).permutation(len(table))
        return np.array(table, np.int64).reshape(-1, 2)[order]

    def rows(i: int) -> Rows:
        # A bucket is at most one batch ahead of its records.
        epoch = max(0, int((i - len(names)) * batch_size // lengths.sum()))
        while begun(epoch + 1).sum() <= i:
            epoch += 1
        number, batch = batches_of(epoch)[i - begun(epoch).sum()]
        positions = np.arange(batch * batch_size, (batch + 1) * batch_size)
        return Rows(names[number], *streams[names[number]].at(positions))

    return Order(rows, tuple(names))


def _check(count: int, batch_size: int, seed: int) -> None:
    if batch_size < 1:
        raise UserError(f"batch_size {batch_size} must be at least 1")
    if not 0 <= seed < 2**32:
        raise UserError(f"data seed {seed} is out of range: use 0 to 2**32 - 1", exit_code=2)
    if not count:
        raise UserError("the data source is empty: no batch can be made from it")


def _make_streams(sources, weights: Sequence[float], seed: int) -> dict[Bucket, _Stream]:
    """The stream of every bucket that has records; its parts are the sources, or all of them as one."""
    mixed = len(weights) > 0
    groups = [[k] for k in range(len(sources))] if mixed else [range(len(sources))]
    # How often each record of a group is drawn in an epoch.
    often = _frequencies(sources, weights) if mixed else np.ones(1)
    streams = {}
    for bucket in sorted({bucket for source in sources for bucket in source}):
        parts, shares, seeds = [], [], []
        for number, group in enumerate(groups):
            found = [np.asarray(sources[k].get(bucket, ()), np.int64) for k in group]
            if sum(map(len, found)):
                parts.append((np.repeat(group, list(map(len, found))), np.concatenate(found)))
                shares.append(often[number] * len(parts[-1][1]))
                seeds.append([seed, *bucket, number] if mixed else [seed, *bucket])
        if parts:
            streams[bucket] = _make_stream(parts, shares, seeds)
    return streams


def _frequencies(sources, weights: Sequence[float]) -> np.ndarray:
    weights = np.asarray(weights, np.float64)
    if len(weights) != len(sources) or not (np.isfinite(weights) & (weights > 0)).all():
        raise UserError(
            f"config.data.weights {tuple(weights.tolist())}: give one number above 0 for each of "
            f"{len(sources)} sources"
        )
    counts = [sum(map(len, source.values())) for source in sources]
    if not all(counts):
        raise UserError(f"source number {counts.index(0)} of the mixture has no records")
    return weights / weights.sum() * sum(counts) / counts


def _make_stream(parts: Sequence[Part], shares: Sequence[float], seeds) -> _Stream:
    """A stream of parts by their ``shares``, each with epochs of its own."""
    part_at, before, per_period = _make_pattern(np.array(shares))
    lengths = np.array([len(records) for _, records in parts])

    @functools.lru_cache(maxsize=2 * len(parts))
    def permute(k: int, epoch: int) -> np.ndarray:
        return np.random.RandomState([*seeds[k], epoch]).permutation(lengths[k])

    def at(positions: np.ndarray) -> Part:
        period, offset = np.divmod(positions, PERIOD)
        chosen = part_at[offset]
        within = period * per_period[chosen] + before[offset]
        epochs, places = np.divmod(within, lengths[chosen])
        sources, records = np.empty((2, len(positions)), np.int64)
        for k, epoch in set(zip(chosen.tolist(), epochs.tolist(), strict=True)):
            mine = (chosen == k) & (epochs == epoch)
            index = permute(k, epoch)[places[mine]]
            sources[mine], records[mine] = parts[k][0][index], parts[k][1][index]
        return sources, records

    return _Stream(max(1, round(float(sum(shares)))), at)


def _make_pattern(shares: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Spreads parts evenly over PERIOD rows, in proportion to ``shares``.

    Returns the part of each row [PERIOD], the rows of that part before it [PERIOD], and the rows of each part.
    """
    exact = shares / shares.sum() * PERIOD
    count = np.maximum(np.floor(exact).astype(np.int64), 1)  # the rarest part still has a row
    left = PERIOD - count.sum()
    if left >= 0:
        count[np.argsort(count - exact, kind="stable")[:left]] += 1
    else:
        count[np.argmax(count)] += left
    part = np.repeat(np.arange(len(count)), count)
    before = np.concatenate([np.arange(n) for n in count])
    order = np.argsort((before + 0.5) / count[part], kind="stable")
    return part[order], before[order], count


def hold_out(
    buckets: Mapping[Bucket, np.ndarray], count: int
) -> tuple[dict[Bucket, np.ndarray], dict[Bucket, np.ndarray]]:
    """Splits a source's records into those of training and ``count`` that are kept from it.

    Each bucket gives its share, rounded, at places that depend on the bucket's length alone. Returns
    ``(training, held_out)``; raises UserError where no record would be left to train on.
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
