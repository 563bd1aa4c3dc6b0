"""The order of records: every record once an epoch, mixtures by weight, and numbers that never change."""

import hashlib
from collections import Counter

import numpy as np
import pytest

from sprint_jax.core.errors import UserError
from sprint_jax.data.order import PERIOD, hold_out, make_order, make_single_order

BUCKETS = {
    (4, 4): np.arange(0, 200),
    (2, 8): np.arange(200, 264),
    (8, 2): np.arange(264, 301),
    (3, 5): np.arange(301, 306),
}
OTHER = {(2, 2): np.arange(30), (4, 4): np.arange(30, 40)}


def digest(order, numbers):
    """A hash of buckets, sources and records of some batches."""
    hashed = hashlib.sha256()
    for i in numbers:
        rows = order.rows(i)
        for part in (rows.bucket, rows.sources, rows.records):
            hashed.update(np.ascontiguousarray(part, np.int64))
    return hashed.hexdigest()[:16]


def draw_epoch(order, batches):
    """How often each record is drawn, by bucket."""
    times = {bucket: Counter() for bucket in order.buckets}
    for rows in map(order.rows, batches):
        times[rows.bucket].update(rows.records.tolist())
    return times


@pytest.mark.parametrize(
    ("count", "batch_size", "seed", "expected"),
    [
        (200, 16, 0, "8fa0f830b4510000"),
        (10_000, 64, 0, "d4e14c8140f694b9"),
        (20_000, 64, 0, "a4a75133dd768ab7"),
        (20_000, 64, 3, "06d62818d3d9ca3a"),
    ],
)
def test_record_numbers_of_the_digits_worlds_never_change(count, batch_size, seed, expected):
    """Taken before digits had an order of this module: its recipes' results depend on them."""
    order = make_single_order(count, (4, 8), batch_size=batch_size, seed=seed)
    hashed = hashlib.sha256()
    for i in [*range(40), 10**6]:
        hashed.update(order.rows(i).records)
    assert hashed.hexdigest()[:16] == expected


@pytest.mark.parametrize(
    ("sources", "changes", "expected"),
    [
        ([BUCKETS], {"batch_size": 8, "seed": 3}, "b92bceda578614cd"),
        ([{(4, 4): np.arange(50)}], {"batch_size": 8, "seed": 0}, "c6c4b52280627f84"),
        ([BUCKETS, OTHER], {}, "9a5e890ec12d6614"),
        ([BUCKETS, OTHER], {"weights": (3.0, 1.0)}, "8c1d8b3cb0f5057a"),
    ],
)
def test_record_numbers_of_buckets_never_change(sources, changes, expected):
    order = make_order(sources, **{"batch_size": 4, "seed": 1} | changes)
    assert digest(order, [*range(200), 10**6]) == expected


def test_a_single_order_has_every_record_once_an_epoch_in_a_new_order():
    epochs = []
    for seed in (0, 1):  # epoch 1 of seed 0 is not epoch 0 of seed 1
        order = make_single_order(23, (1, 1), batch_size=4, seed=seed)
        epochs += list(np.concatenate([order.rows(i).records for i in range(23)]).reshape(4, 23))
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 8


@pytest.mark.parametrize("batch_size", [1, 8, 16])
def test_every_record_comes_once_an_epoch_but_for_a_last_partial_batch(batch_size):
    order = make_order([BUCKETS], batch_size=batch_size, seed=3)
    assert order.buckets == ((4, 4), (2, 8), (8, 2), (3, 5))
    counts = [sum(-(-epoch * len(r) // batch_size) for r in BUCKETS.values()) for epoch in range(4)]
    for epoch in range(3):
        times = draw_epoch(order, range(counts[epoch], counts[epoch + 1]))
        for bucket, members in BUCKETS.items():
            assert set(times[bucket]) <= set(members.tolist())
            # Those of a partial batch come an epoch early, or again.
            odd = sum(abs(times[bucket][record] - 1) for record in members.tolist())
            assert odd <= (2 * (batch_size - 1) if batch_size > 1 else 0)


def test_sources_without_weights_are_one_set():
    sources = [{(2, 2): np.arange(30)}, {(2, 2): np.arange(10), (1, 4): np.arange(6)}]
    order = make_order(sources, batch_size=2, seed=0)
    pairs = Counter(
        (rows.bucket, source, record)
        for rows in map(order.rows, range(23))
        for source, record in zip(rows.sources.tolist(), rows.records.tolist(), strict=True)
    )
    assert set(pairs.values()) == {1} and len(pairs) == 46


def test_a_mixture_has_its_weights_and_every_record_of_a_source_equally_often():
    sources = [{(2, 2): np.arange(30), (1, 4): np.arange(30, 40)}, {(2, 2): np.arange(400)}]
    order = make_order(sources, batch_size=4, seed=0, weights=(3.0, 1.0))
    times = np.zeros((2, 400), int)
    for rows in map(order.rows, range(2 * 110 * 6)):
        np.add.at(times, (rows.sources, rows.records), 1)
    assert times[0].sum() / times.sum() == pytest.approx(0.75, abs=0.01)
    assert not times[0, 40:].any() and times[1].all()
    assert np.ptp(times[0, :30]) <= 1
    # The other bucket of the first source: as often per record, to within a batch.
    assert times[0, 30:40].mean() == pytest.approx(times[0, :30].mean(), rel=0.03)


def test_a_rare_source_of_a_mixture_still_comes_up_and_evenly():
    sources = [{(1, 1): np.arange(9)}, {(1, 1): np.arange(9)}]
    order = make_order(sources, batch_size=100, seed=0, weights=(1.0, 999.0))
    found = np.concatenate([order.rows(i).sources for i in range(2 * PERIOD // 100)])
    places = np.flatnonzero(found == 0)
    assert len(places) == 20 and np.diff(places).min() > 900


def test_held_out_records_are_kept_from_training_by_their_places_in_every_bucket():
    training, held_out = hold_out(BUCKETS, 60)
    _, moved = hold_out({bucket: records + 1000 for bucket, records in BUCKETS.items()}, 60)
    assert sum(map(len, held_out.values())) == 60
    for bucket, records in BUCKETS.items():
        both = np.concatenate([training[bucket], held_out[bucket]])
        assert sorted(both.tolist()) == records.tolist()
        assert len(held_out[bucket]) == pytest.approx(60 * len(records) / 306, abs=1)
        np.testing.assert_array_equal(held_out[bucket] + 1000, moved[bucket])
    with pytest.raises(UserError, match=r"config\.data\.holdout: 306"):
        hold_out(BUCKETS, 306)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"sources": [{(1, 1): np.arange(0)}]}, "empty"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"seed": -1}, "seed -1"),
        ({"seed": 2**32}, "seed 4294967296"),
        ({"weights": (1.0, 2.0)}, r"config\.data\.weights \(1\.0, 2\.0\)"),
        ({"weights": (0.0,)}, r"config\.data\.weights \(0\.0,\)"),
        ({"sources": [BUCKETS, {}], "weights": (1.0, 1.0)}, "source number 1"),
    ],
)
def test_what_cannot_be_ordered_is_named(change, named):
    arguments = {"sources": [BUCKETS], "batch_size": 4, "seed": 0} | change
    with pytest.raises(UserError, match=named):
        make_order(arguments.pop("sources"), **arguments)
