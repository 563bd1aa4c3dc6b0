"""Prefetch: batches by number, made ahead by a thread that ends with its iterator."""

import contextlib
import threading
import time
import weakref
from itertools import islice

import pytest

from sprint_jax.core.errors import UserError
from sprint_jax.data.loader import ON_DEVICE, prefetch


def prefetch_threads():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_batches_come_numbered_from_the_start_asked_for():
    with contextlib.closing(prefetch(lambda i: 10 * i, 7, 3)) as ahead:
        assert list(islice(ahead, 20)) == [(i, 10 * i) for i in range(7, 27)]
    assert not prefetch_threads()


@pytest.mark.parametrize("depth", [1, 4])
def test_devices_hold_the_batches_that_a_plan_counts(depth):
    alive, most, lock = 0, 0, threading.Lock()

    class Placed:
        pass

    def count(change):
        nonlocal alive, most
        with lock:
            alive, most = alive + change, max(most, alive + change)

    def place(_):
        count(1)
        batch = Placed()
        weakref.finalize(batch, count, -1)
        return batch

    with contextlib.closing(prefetch(lambda i: i, 0, depth, place)) as ahead:
        for _ in range(20):
            _batch = next(ahead)  # until then it is the one before, as in a training
            time.sleep(0.01)
    assert depth + 1 <= most <= depth + ON_DEVICE


def test_no_more_than_depth_batches_are_placed_ahead():
    asked, placed, third = [], [], threading.Event()

    def batches(i):
        asked.append(i)
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
    assert asked == [0, 1, 2, 3] and placed == [(i, "prefetch") for i in range(3)]
    ahead.close()  # while the thread wants to hand over batch 3
    assert not prefetch_threads()


@pytest.mark.parametrize("failing", ["batches", "place"])
def test_an_error_in_the_thread_reaches_the_consumer_after_the_good_batches(failing):
    def fail(i):
        if i == 2:
            raise UserError("record 7 is broken")
        return i

    ahead = prefetch(**{"batches": lambda i: i, "start": 0, "depth": 8} | {failing: fail})
    assert [i for i, _ in islice(ahead, 2)] == [0, 1]
    with pytest.raises(UserError, match="record 7"):
        next(ahead)
    assert not prefetch_threads() and next(ahead, None) is None


def test_the_thread_ends_with_its_iterator():
    ahead = prefetch(lambda i: i, 0, 1)
    next(ahead)
    assert prefetch_threads()
    del ahead
    assert not prefetch_threads()
    prefetch(lambda i: i, 0, 1).close()  # never started
