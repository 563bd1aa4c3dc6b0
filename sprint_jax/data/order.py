"""Order of records: those that make global batch i, as a function of (seed, i).

A bucket holds records of one size, and a batch is of one bucket, so that every batch has one shape. A bucket
is an endless stream of epochs, each with every record once, in an order of its own; batches are cut from the
stream, so one may span two epochs and none is smaller. Epoch e of the whole has those batches of each bucket
that are full once its e-th epoch is through, in random order; what is left over comes first in the next one.
So after e epochs every record was drawn e times, or e - 1 times where it is left over, and none more often.

A bucket of fewer records than a batch would flood any epoch that had a batch of it. Its batches come as rarely
as its records ask for: of 100 records at a batch of 500, in one of five epochs, with each record five times.

Nothing has a position to save, and nothing a table of records: a run that resumes at step i asks for batch i.
"""

import bisect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import grain
import numpy as np

from ..core.errors import UserError
from .members import Bucket, Buckets, Members, Without
from .permutation import permute

Part = tuple[np.ndarray, np.ndarray]

# Of this module's orders: part of what a run may not change when it resumes.
VERSION = 2
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

    Its shuffle is grain's, as it was before there were buckets: recipes have results by it.

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
    sources: Sequence[Buckets],
    *,
    batch_size: int,
    seed: int,
    weights: Sequence[float] = (),
) -> Order:
    """Returns the order of the records of one source, or of a mixture, in buckets.

    Without weights the records of all sources are one set, each drawn once per epoch. With weights a
    source has its share of the rows, whatever its size, spread evenly, and epochs of its own; within a
    source all records are drawn equally often.

    Args:
      sources: for each source, its records by bucket.
      weights: one above 0 for each source, in any unit; or none.

    Raises:
      UserError: no records, or a batch size, seed or weights that cannot be.
    """
    _check(sum(len(records) for source in sources for records in source.values()), batch_size, seed)
    streams = _make_streams(sources, weights, seed)
    names = sorted(streams, key=lambda bucket: (-streams[bucket].length, bucket))
    lengths = np.array([streams[bucket].length for bucket in names], np.int64)
    # The batches of small buckets begin at different times, or all would come in the same epoch.
    turns = np.arange(len(names)) * (math.sqrt(5) - 1) / 2 % 1
    offsets = np.where(lengths < batch_size, (turns * batch_size).astype(np.int64), 0)

    def begun(epoch: int) -> np.ndarray:
        """Numbers of batches of each bucket that come before an epoch."""
        return (epoch * lengths + offsets) // batch_size

    def total(epoch: int) -> int:
        return int(begun(epoch).sum())

    def rows(i: int) -> Rows:
        # A bucket is less than a batch away from its share of all rows.
        likely, more = (i * batch_size // int(lengths.sum()) for i in (i, len(names) + 1))
        near = range(max(0, likely - more), likely + more + 3)
        epoch = near[bisect.bisect_right(near, i, key=total) - 1]
        before = begun(epoch)
        ends = np.cumsum(begun(epoch + 1) - before)
        place = permute(np.array([i - total(epoch)]), int(ends[-1]), (seed, epoch))[0]
        number = int(np.searchsorted(ends, place, side="right"))
        batch = int(begun(epoch + 1)[number] - (ends[number] - place))
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


def _make_streams(
    sources: Sequence[Buckets], weights: Sequence[float], seed: int
) -> dict[Bucket, _Stream]:
    """The stream of every bucket that has records; its parts are the sources, or all of them as one."""
    mixed = len(weights) > 0
    numbers = list(range(len(sources)))
    groups = [[k] for k in numbers] if mixed else [numbers]
    # How often each record of a group is drawn in an epoch.
    often = _frequencies(sources, weights) if mixed else np.ones(1)
    streams = {}
    for bucket in sorted({bucket for source in sources for bucket in source}):
        parts, shares, keys = [], [], []
        for number, group in enumerate(groups):
            found = {k: sources[k][bucket] for k in group if len(sources[k].get(bucket, ()))}
            if found:
                parts.append(found)
                shares.append(often[number] * sum(map(len, found.values())))
                keys.append((seed, *bucket, number))
        if parts:
            streams[bucket] = _make_stream(parts, shares, keys)
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


def _make_stream(
    parts: Sequence[Mapping[int, Members]], shares: Sequence[float], keys: Sequence[tuple[int, ...]]
) -> _Stream:
    """A stream of parts, records of one source or of several, by their ``shares``, each with its own epochs."""
    part_at, before, per_period = _make_pattern(np.array(shares))
    ends = [np.cumsum([len(members) for members in part.values()]) for part in parts]
    lengths = np.array([each[-1] for each in ends])

    def at(positions: np.ndarray) -> Part:
        period, offset = np.divmod(positions, PERIOD)
        chosen = part_at[offset]
        within = period * per_period[chosen] + before[offset]
        epochs, places = np.divmod(within, lengths[chosen])
        sources, records = np.empty((2, len(positions)), np.int64)
        for k, epoch in sorted(set(zip(chosen.tolist(), epochs.tolist(), strict=True))):
            mine = (chosen == k) & (epochs == epoch)
            places[mine] = permute(places[mine], int(lengths[k]), (*keys[k], epoch))
        for k, part in enumerate(parts):
            number = np.searchsorted(ends[k], places, side="right")
            for place, (source, members) in enumerate(part.items()):
                mine = (chosen == k) & (number == place)
                sources[mine] = source
                records[mine] = members[places[mine] - (ends[k][place] - len(members))]
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


def hold_out(buckets: Buckets, count: int) -> tuple[Buckets, dict[Bucket, np.ndarray]]:
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
        members = buckets[bucket]
        mine = round(left * len(members) / records_left) if records_left else 0
        left, records_left = left - mine, records_left - len(members)
        places = np.sort(permute(np.arange(mine), len(members), (len(members),)))
        held_out[bucket] = members[places]
        training[bucket] = Without(members, places) if mine else members
    return training, held_out
