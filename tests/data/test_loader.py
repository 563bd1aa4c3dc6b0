"""The loader: batches as an exact function of (seed, batch number), for any number of hosts."""

import contextlib
import threading
import time
from itertools import islice

import numpy as np
import pytest

from sprint_jax.core.errors import UserError
from sprint_jax.data.loader import encode_online, make_batches, prefetch
from sprint_jax.digits.encoders import SpaceToDepth, WordEncoder


def numbers(records):
    return {"x": np.array(records)}


def loader(size=23, batch_size=4, **options):
    return make_batches(
        range(size), numbers, batch_size=batch_size, **{"seed": 0, "shuffle": True} | options
    )


def stream(batches, count):
    return np.concatenate([batches(i)["x"] for i in range(count)])


def test_every_epoch_sees_each_record_once_in_a_new_order():
    # 23 records and batches of 4: epochs end inside batches, and nothing is dropped.
    epochs = stream(loader(), 23).reshape(4, 23)
    for epoch in epochs:
        assert sorted(epoch) == list(range(23))
    orders = {tuple(epoch) for epoch in epochs}
    assert len(orders) == 4 and tuple(range(23)) not in orders


def test_without_shuffle_the_order_is_that_of_the_source():
    assert stream(loader(shuffle=False), 23).tolist() == list(range(23)) * 4


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("process_count", [1, 2, 4, 12])
def test_the_global_batch_does_not_depend_on_the_hosts(process_count, shuffle):
    size, batch_size = 50, 12
    whole = loader(size, batch_size, shuffle=shuffle)
    hosts = [
        loader(size, batch_size, shuffle=shuffle, rows=rows)
        for rows in np.split(np.arange(batch_size), process_count)
    ]
    for i in range(9):
        rows = [host(i)["x"] for host in hosts]
        assert [len(row) for row in rows] == [batch_size // process_count] * process_count
        np.testing.assert_array_equal(np.concatenate(rows), whole(i)["x"])
    # Within an epoch no record is on two hosts or in two batches.
    epoch = np.concatenate([host(i)["x"] for i in range(4) for host in hosts])
    assert len(set(epoch)) == 48


def test_batches_are_a_function_of_seed_and_number():
    first, again = loader(1000, 64), loader(1000, 64)
    forward = [first(i)["x"] for i in range(40)]
    for i in reversed(range(40)):  # another loader, in another order
        np.testing.assert_array_equal(again(i)["x"], forward[i])
    assert not np.array_equal(loader(1000, 64, seed=1)(0)["x"], forward[0])
    # Far into a run is as good as its start.
    assert sorted(loader(64, 64)(10**9)["x"]) == list(range(64))


def test_seeds_do_not_share_their_epochs():
    """Epoch 1 of seed 0 must not be epoch 0 of seed 1, or runs with seeds 0, 1, 2 would overlap."""
    epochs = {
        seed: [tuple(loader(64, 64, seed=seed)(i)["x"]) for i in range(4)] for seed in range(4)
    }
    every = [epoch for of_seed in epochs.values() for epoch in of_seed]
    assert len(set(every)) == len(every)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "the data source is empty"),
        ({"batch_size": 0}, "batch_size 0 must be at least 1"),
        ({"rows": [3, 4]}, "rows .3, 4. are not rows of a batch of 4"),
        ({"rows": []}, "are not rows of a batch of 4"),
        ({"seed": -1}, "data seed -1 is out of range"),
        ({"seed": 2**32}, "data seed 4294967296 is out of range"),
    ],
)
def test_errors_of_users(options, message):
    with pytest.raises(UserError, match=message):
        loader(**options)


def test_a_negative_batch_and_a_lossy_transform_are_refused():
    with pytest.raises(UserError, match="batch number -1 is negative"):
        loader()(-1)
    lossy = make_batches(range(9), lambda r: {"x": np.array(r[1:])}, batch_size=4, seed=0)
    with pytest.raises(UserError, match="transform made 3 rows of 'x' from 4 records"):
        lossy(0)


def test_sources_that_read_many_are_asked_once_for_this_hosts_rows_alone():
    class Source:
        calls: list

        def __init__(self):
            self.calls = []

        def __len__(self):
            return 100

        def __getitem__(self, index):
            raise AssertionError("read one by one")

        def __getitems__(self, indices):
            self.calls.append(list(indices))
            return [index * 10 for index in indices]

    source = Source()
    options = {"batch_size": 8, "seed": 3, "rows": range(4, 8)}
    batch = make_batches(source, numbers, **options)(5)["x"]
    assert len(source.calls) == 1 and len(source.calls[0]) == 4
    np.testing.assert_array_equal(batch, np.array(source.calls[0]) * 10)
    np.testing.assert_array_equal(batch, make_batches(range(100), numbers, **options)(5)["x"] * 10)


def pictures(count):
    generator = np.random.default_rng(0)
    words = ["a 3", "a red 3 left of a green 7 on blue"]
    return [
        {
            "image": generator.integers(0, 256, (16, 16, 3), np.uint8),
            "caption": words[k % 2],
        }
        for k in range(count)
    ]


def test_encode_online_makes_the_batch_of_training():
    records = pictures(4)
    batch = encode_online(SpaceToDepth(), WordEncoder())(records)
    assert {name: (a.shape, a.dtype.name) for name, a in batch.items()} == {
        "latents": ((4, 8, 8, 12), "float32"),
        "text": ((4, 12, 64), "float32"),
        "mask": ((4, 12), "int32"),
    }
    pixels = SpaceToDepth().decode(batch["latents"])
    expected = np.stack([record["image"] for record in records]) / 127.5 - 1
    np.testing.assert_allclose(pixels, expected, atol=1e-6)
    assert batch["mask"].sum(1).tolist() == [3, 11, 3, 11]


def test_a_batch_of_64_takes_milliseconds():
    source = pictures(200) * 100  # as many as the digits world; grain is slow for very few
    batches = make_batches(
        source, encode_online(SpaceToDepth(), WordEncoder()), batch_size=64, seed=0
    )
    times = []
    for i in range(20):
        start = time.perf_counter()
        batches(i)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.005  # about 1 ms measured


def prefetch_threads():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_prefetch_yields_numbered_batches_from_the_start_asked_for():
    batches = loader()
    with contextlib.closing(prefetch(batches, 7, 3)) as ahead:
        for expected, (i, batch) in zip(range(7, 30), ahead, strict=False):
            assert i == expected
            np.testing.assert_array_equal(batch["x"], batches(i)["x"])
    assert not prefetch_threads()


def test_prefetch_works_ahead_by_its_depth_and_no_more():
    asked = []
    third = threading.Event()

    def batches(i):
        asked.append(i)
        if i == 3:
            third.set()
        return {}

    ahead = prefetch(batches, 0, 2)
    assert next(ahead)[0] == 0
    # 0 was taken, 1 and 2 wait, 3 is in the thread's hands.
    assert third.wait(10)
    time.sleep(0.1)
    assert asked == [0, 1, 2, 3]
    ahead.close()  # while the thread wants to hand over batch 3
    assert not prefetch_threads()


def test_no_more_than_depth_batches_are_placed_ahead():
    placed, third = [], threading.Event()

    def batches(i):
        if i == 3:
            third.set()
        return i

    def place(i):
        placed.append((i, threading.current_thread().name))
        return {"x": 10 * i}

    ahead = prefetch(batches, 0, 2, place)
    assert next(ahead) == (0, {"x": 0})
    assert third.wait(10)
    time.sleep(0.1)
    # 0 is in use, 1 and 2 wait; 3 is ready, but on the host.
    assert placed == [(0, "prefetch"), (1, "prefetch"), (2, "prefetch")]
    assert next(ahead) == (1, {"x": 10})
    ahead.close()
    assert not prefetch_threads()


def test_an_error_in_placing_reaches_the_consumer():
    def place(i):
        raise UserError("no room on the device")

    with pytest.raises(UserError, match="no room on the device"):
        next(prefetch(lambda i: i, 0, 2, place))
    assert not prefetch_threads()


def test_an_error_in_the_thread_reaches_the_consumer_after_the_good_batches():
    def batches(i):
        if i == 2:
            raise UserError("record 7 is broken")
        return {"x": np.array([i])}

    ahead = prefetch(batches, 0, 8)
    assert [i for i, _ in islice(ahead, 2)] == [0, 1]
    with pytest.raises(UserError, match="record 7 is broken"):
        next(ahead)
    assert not prefetch_threads()
    assert next(ahead, None) is None


def test_prefetch_ends_with_its_iterator_and_refuses_no_depth():
    ahead = prefetch(loader(), 0, 1)
    next(ahead)
    assert prefetch_threads()
    del ahead
    assert not prefetch_threads()
    prefetch(loader(), 0, 1).close()  # never started
    with pytest.raises(UserError, match="prefetch depth 0 is too small"):
        prefetch(loader(), 0, 0)
