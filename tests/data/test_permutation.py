"""Permutations without a table: one to one, equally frequent, and numbers that never change."""

import hashlib
import math
from collections import Counter

import numpy as np
import pytest

from sprint_jax.data.permutation import permute


@pytest.mark.parametrize("count", [*range(1, 18), 97, 100, 101, 1024, 4099, 65_537])
def test_every_thing_stands_at_one_place(count):
    for key in ((0, 0), (0, 1), (7, 2**31)):
        assert np.array_equal(np.sort(permute(np.arange(count), count, key)), np.arange(count))


def test_numbers_never_change_and_do_not_depend_on_what_else_is_asked_for():
    hashed = hashlib.sha256()
    for count in (2, 5, 513, 10**6, 10**9, 2**40 + 7):
        places = np.linspace(0, count - 1, 50).astype(np.int64)
        found = permute(places, count, (3, count, 1))
        assert found.tolist() == [
            permute(places[k : k + 1], count, (3, count, 1))[0] for k in range(50)
        ]
        assert found.min() >= 0 and found.max() < count
        hashed.update(found.astype("<i8").tobytes())
    assert hashed.hexdigest()[:16] == "727ce944d62a9e44"


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_all_orders_of_a_few_things_are_equally_frequent(count):
    keys, orders = 20 * math.factorial(count), math.factorial(count)
    seen = Counter(
        tuple(permute(np.arange(count), count, (1, key)).tolist()) for key in range(keys)
    )
    expected = keys / orders
    chi = sum((times - expected) ** 2 / expected for times in seen.values())
    chi += (orders - len(seen)) * expected
    # Five standard deviations.
    assert chi < (orders - 1) + 5 * math.sqrt(2 * (orders - 1))


def test_neighbours_are_strangers():
    count = 10**9
    for key in range(5):
        found = permute(np.arange(20_000), count, (key,))
        assert len(set(found.tolist())) == len(found)
        # Of uniform numbers: correlation with the place, and with the one before.
        for other in (np.arange(20_000), np.roll(found, 1)):
            assert abs(np.corrcoef(found, other)[0, 1]) < 5 / math.sqrt(20_000)
        parts = np.bincount(found * 100 // count, minlength=100)
        assert ((parts - 200) ** 2 / 200).sum() < 99 + 5 * math.sqrt(2 * 99)
