"""The order of records: every record once an epoch, mixtures by weight, and numbers that never change."""

import hashlib
import tracemalloc
from collections import Counter

import numpy as np
import pytest

from sprint_jax.core.errors import UserError
from sprint_jax.data.buckets import size_table
from sprint_jax.data.members import Runs, Surveyed
from sprint_jax.data.order import PERIOD, hold_out, make_order, make_single_order
from sprint_jax.data.survey import join_sizes

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
        ([BUCKETS], {"batch_size": 8, "seed": 3}, "e11ed8165510c69f"),
        ([{(4, 4): np.arange(50)}], {"batch_size": 8, "seed": 0}, "ccab7c7f5b12d45f"),
        ([BUCKETS, OTHER], {}, "3c24723301aee0b8"),
        ([BUCKETS, OTHER], {"weights": (3.0, 1.0)}, "3af92bc5723f6ab7"),
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


def times_drawn(order, batches, count):
    """How often each of ``count`` records of one source is drawn, and the bucket of each batch."""
    times, buckets = np.zeros(count, int), []
    for rows in map(order.rows, batches):
        np.add.at(times, rows.records, 1)
        buckets.append(rows.bucket)
    return times, buckets


@pytest.mark.parametrize("batch_size", [2, 5])
def test_after_so_many_epochs_a_record_was_drawn_as_often_or_once_less(batch_size):
    order = make_order([BUCKETS], batch_size=batch_size, seed=3)
    assert order.buckets == ((4, 4), (2, 8), (8, 2), (3, 5))
    times, buckets = np.zeros(306, int), Counter()
    for epoch in range(1, 5):
        full = {bucket: epoch * len(records) // batch_size for bucket, records in BUCKETS.items()}
        more, found = times_drawn(order, range(buckets.total(), sum(full.values())), 306)
        times += more
        buckets.update(found)
        assert buckets == full
        assert set(times) <= {epoch - 1, epoch}
        for records in BUCKETS.values():  # those of its last batch that is not full
            assert (times[records] < epoch).sum() == epoch * len(records) % batch_size


def test_buckets_that_fill_no_batch_have_their_share_and_do_not_flood_the_first_epochs():
    sizes = [613, 471, 320, 250, 194, 160, 133, 78, 37, 15, 7, 1]  # of photos, at a batch of 512
    ends = np.cumsum(sizes)
    buckets = {
        (1, k + 1): np.arange(end - n, end)
        for k, (n, end) in enumerate(zip(sizes, ends, strict=True))
    }
    order = make_order([buckets], batch_size=512, seed=0)
    for batches in (13, 100):
        times, found = times_drawn(order, range(batches), ends[-1])
        # Six of a hundred records are of the five smallest buckets.
        rare = sum(len(buckets[bucket]) < 100 for bucket in found)
        assert abs(rare - batches * 138 / ends[-1]) < 2
    # In 100 batches of 512 each record is drawn 22 times, or as often to within one batch of its bucket.
    for records in buckets.values():
        assert np.ptp(times[records]) <= 1
        assert abs(times[records] - 100 * 512 / ends[-1]).max() <= 2 + 512 / len(records)


def photos(count, sizes):
    """Numbers of sizes of photos: of common aspect ratios, and cut by hand."""
    random = np.random.default_rng(0)
    common = random.choice([2 / 3, 3 / 4, 9 / 16, 1, 3 / 2, 4 / 3, 16 / 9], count)
    ratios = common * np.exp(random.normal(0, 0.15, count))
    table = np.array([height / width for height, width in sizes])
    return np.abs(table[None] - ratios[:, None]).argmin(1).astype(np.int8)


@pytest.mark.parametrize("count", [5_000, 8_000])
def test_photos_in_published_sizes_are_each_drawn_once_an_epoch(count):
    sizes = size_table(512)
    survey = Surveyed(photos(count, sizes), len(sizes))
    ((buckets,), line) = join_sizes([survey], sizes, 32, 512)
    assert min(map(len, buckets.values())) >= 512 and sum(map(len, buckets.values())) == count
    assert "512" in line
    order = make_order([buckets], batch_size=512, seed=0)
    times, before = np.zeros(count, int), 0
    for epoch in range(1, 4):
        batches = sum(epoch * len(members) // 512 for members in buckets.values())
        times += times_drawn(order, range(before, batches), count)[0]
        before = batches
        assert set(times) <= {epoch - 1, epoch}
        assert (times < epoch).sum() == epoch * count - 512 * batches


def test_a_billion_records_are_ordered_without_a_table_of_them():
    sources = [
        {(4, 4): Runs([0], [900_000_000]), (2, 8): Runs([900_000_000], [99_999_000])},
        {(4, 4): Runs([0, 300], [100, 50]), (8, 2): Runs([100], [200])},
    ]
    for weights in ((), (3.0, 1.0)):
        tracemalloc.start()
        order = make_order(sources, batch_size=512, seed=1, weights=weights)
        numbers = [*range(4), 10**6, 10**9]
        rows = [order.rows(i) for i in numbers]
        assert tracemalloc.get_traced_memory()[1] < 4e6
        tracemalloc.stop()
        for each in rows:
            assert each.records.max() < 999_999_000 and each.records.min() >= 0
        first = np.concatenate([r.records[r.sources == 0] for r in rows[:4]])
        assert len(set(first.tolist())) == len(first) > 1000


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
        places = np.arange(len(training[bucket]))
        both = np.concatenate([training[bucket][places], held_out[bucket]])
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
