"""Tests of order: every record once per epoch, the same on any number of hosts, mixtures by weight."""

from collections import Counter

import numpy as np
import pytest

from sprint_jax.core.errors import UserError
from sprint_jax.data.order import PERIOD, hold_out, make_order

BUCKETS = {
    (4, 4): np.arange(0, 200),
    (2, 8): np.arange(200, 264),
    (8, 2): np.arange(264, 301),
    (3, 5): np.arange(301, 306),
}


def drawn(order, batches):
    """Records of batches by bucket, in the order in which they were drawn within it."""
    records = {bucket: [] for bucket in order.buckets}
    for i in batches:
        rows = order.rows(i)
        assert order.bucket(i) == rows.bucket
        records[rows.bucket] += rows.records.tolist()
    return records


@pytest.mark.parametrize("batch_size", [1, 8, 16])
def test_three_epochs_have_every_record_three_times_but_for_a_last_partial_batch(batch_size):
    order = make_order([BUCKETS], batch_size=batch_size, seed=3)
    counts = [sum(-(-epoch * len(r) // batch_size) for r in BUCKETS.values()) for epoch in range(4)]
    for epoch in range(3):
        records = drawn(order, range(counts[epoch], counts[epoch + 1]))
        for bucket, members in BUCKETS.items():
            times = Counter(records[bucket])
            assert set(times) <= set(members.tolist())
            # Those of a partial batch come an epoch early, or again.
            odd = sum(abs(times[record] - 1) for record in members.tolist())
            assert odd <= 2 * (batch_size - 1)
            if batch_size == 1:
                assert odd == 0


def test_batches_of_one_bucket_cut_an_endless_stream_of_shuffled_epochs():
    order = make_order([BUCKETS], batch_size=16, seed=0)
    batches = {bucket: [] for bucket in BUCKETS}
    for i in range(90):
        rows = order.rows(i)
        batches[rows.bucket].append(rows.records)
    # Which comes first is random, which there are is not: lay them end to end in the stream's order.
    members = BUCKETS[4, 4]
    stream = np.concatenate(batches[4, 4][:25])  # two epochs of 200 are 25 batches of 16
    assert Counter(stream.tolist()) == dict.fromkeys(members.tolist(), 2)
    assert any((a != b).any() for a, b in zip(batches[4, 4][:12], batches[4, 4][12:], strict=False))


def test_an_order_depends_on_seed_and_number_alone():
    one, same, other = (make_order([BUCKETS], batch_size=8, seed=seed) for seed in (1, 1, 2))
    numbers = list(np.random.default_rng(0).permutation(200))
    first = {int(i): one.rows(int(i)) for i in numbers}
    for i in sorted(first):
        again = same.rows(i)
        assert again.bucket == first[i].bucket
        np.testing.assert_array_equal(again.records, first[i].records)
    assert any(
        other.bucket(i) != first[i].bucket or (other.rows(i).records != first[i].records).any()
        for i in first
    )


def test_orders_are_those_of_every_version():
    rows = make_order([BUCKETS], batch_size=4, seed=5).rows(7)
    assert rows.bucket == (2, 8)
    assert rows.records.tolist() == [254, 223, 214, 219]


def test_the_largest_bucket_comes_first_and_buckets_come_in_proportion():
    order = make_order([BUCKETS], batch_size=1, seed=0)
    assert order.buckets == ((4, 4), (2, 8), (8, 2), (3, 5))
    times = Counter(order.bucket(i) for i in range(306))
    assert times == {bucket: len(records) for bucket, records in BUCKETS.items()}


def test_sources_without_weights_are_one_set():
    sources = [{(2, 2): np.arange(30)}, {(2, 2): np.arange(10), (1, 4): np.arange(6)}]
    order = make_order(sources, batch_size=2, seed=0)
    rows = [order.rows(i) for i in range(23)]
    pairs = Counter(
        (row.bucket, int(s), int(r))
        for row in rows
        for s, r in zip(row.sources, row.records, strict=True)
    )
    assert set(pairs.values()) == {1} and len(pairs) == 46


def test_a_mixture_has_its_weights_and_every_record_of_a_source_equally_often():
    sources = [
        {(2, 2): np.arange(30), (1, 4): np.arange(30, 40)},
        {(2, 2): np.arange(400)},
    ]
    order = make_order(sources, batch_size=4, seed=0, weights=(3.0, 1.0))
    times = [Counter(), Counter()]
    for i in range(2 * 110 * 6):
        row = order.rows(i)
        for s, r in zip(row.sources, row.records, strict=True):
            times[s][int(r)] += 1
    total = sum(times[0].values()) + sum(times[1].values())
    assert sum(times[0].values()) / total == pytest.approx(0.75, abs=0.01)
    assert len(times[0]) == 40 and len(times[1]) == 400
    large = [times[0][r] for r in range(30)]
    assert max(large) - min(large) <= 1
    # The other bucket of the first source: as often per record, to within a batch.
    small = [times[0][r] for r in range(30, 40)]
    assert np.mean(small) == pytest.approx(np.mean(large), rel=0.03)


def test_a_rare_source_of_a_mixture_still_comes_up_and_evenly():
    sources = [{(1, 1): np.arange(9)}, {(1, 1): np.arange(9)}]
    order = make_order(sources, batch_size=100, seed=0, weights=(1.0, 999.0))
    found = np.concatenate([order.rows(i).sources for i in range(2 * PERIOD // 100)])
    places = np.flatnonzero(found == 0)
    assert len(places) == 20
    assert np.diff(places).min() > 900


def test_held_out_records_are_kept_from_training_in_every_bucket():
    training, held_out = hold_out(BUCKETS, 60)
    assert sum(map(len, held_out.values())) == 60
    for bucket, records in BUCKETS.items():
        both = np.concatenate([training[bucket], held_out[bucket]])
        assert sorted(both.tolist()) == records.tolist()
        assert len(held_out[bucket]) == pytest.approx(60 * len(records) / 306, abs=1)


def test_what_is_held_out_depends_on_places_not_on_numbers():
    _, first = hold_out(BUCKETS, 60)
    _, second = hold_out({bucket: records + 1000 for bucket, records in BUCKETS.items()}, 60)
    for bucket in BUCKETS:
        np.testing.assert_array_equal(first[bucket] + 1000, second[bucket])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sources": [{(1, 1): np.arange(0)}]}, "empty"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"seed": -1}, "seed -1"),
        ({"weights": (1.0, 2.0)}, "give one number above 0 for each of 1 sources"),
        ({"weights": (0.0,)}, "give one number above 0"),
        ({"sources": [BUCKETS, {}], "weights": (1.0, 1.0)}, "source number 1"),
    ],
)
def test_what_cannot_be_ordered_is_said(change, message):
    arguments = {"sources": [BUCKETS], "batch_size": 4, "seed": 0} | change
    with pytest.raises(UserError, match=message):
        make_order(arguments.pop("sources"), **arguments)


def test_batch_numbers_are_not_negative_and_not_everything_can_be_held_out():
    with pytest.raises(UserError, match="negative"):
        make_order([BUCKETS], batch_size=4, seed=0).rows(-1)
    with pytest.raises(UserError, match="306 records cannot be held out of 306"):
        hold_out(BUCKETS, 306)
