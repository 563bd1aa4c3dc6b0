"""Records of a bucket by compact indices: the same numbers as of plain arrays."""

import numpy as np
import pytest

from sprint_jax.data.members import BLOCK, Runs, Surveyed, Without


def all_of(members):
    return members[np.arange(len(members))].tolist()


def test_runs_are_the_numbers_in_them():
    runs = Runs([3, 10, 100], [4, 1, 50])
    assert all_of(runs) == [3, 4, 5, 6, 10, *range(100, 150)]
    assert runs[np.array([54, 0, 4])].tolist() == [149, 3, 10]
    assert runs.hash() == Runs([3, 10, 100], [4, 1, 50]).hash() != Runs([3, 10], [4, 51]).hash()


@pytest.mark.parametrize("count", [1, BLOCK - 1, BLOCK, 3 * BLOCK + 17, 300 * BLOCK])
@pytest.mark.parametrize("dtype", [np.int8, np.int16])
def test_surveyed_records_are_found_by_kind_as_by_a_look_at_all(count, dtype):
    kinds = 127 if dtype == np.int8 else 300
    numbers = np.random.default_rng(0).integers(-1, 5, count).astype(dtype)
    numbers[count // 2 :: 7] = kinds - 1
    survey = Surveyed(numbers, kinds)
    expected = np.bincount(numbers[numbers >= 0], minlength=kinds)
    assert survey.counts.tolist() == expected.tolist()
    for chosen in ([0], [1, 3], [kinds - 1], [6], [*range(kinds)]):
        found, whole = survey.select(chosen), np.flatnonzero(np.isin(numbers, chosen))
        assert len(found) == len(whole)
        places = np.random.default_rng(1).permutation(len(whole))[:500]
        assert found[places].tolist() == whole[places].tolist()
    changed = numbers.copy()
    changed[-1] = 5
    hashes = {survey.select([0]).hash(), survey.select([0, 1]).hash()}
    assert len(hashes | {Surveyed(changed, kinds).select([0]).hash()}) == 3


def test_what_is_left_out_is_passed_over():
    numbers = np.arange(100, 120)
    for places in ([], [0], [19], [0, 1, 2, 18, 19], [5, 7, 8, 9, 12], [*range(20)]):
        left = Without(numbers, np.array(places, np.int64))
        assert all_of(left) == np.delete(numbers, places).tolist()
