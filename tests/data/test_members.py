"""Records of a bucket by compact indices: the same numbers as of plain arrays."""

import numpy as np
import pytest
from helpers.encoding import Pictures
from helpers.processes import run_processes

from sprint_jax.core.errors import UserError
from sprint_jax.data import survey as surveying
from sprint_jax.data.members import BLOCK, Runs, Surveyed, Without
from sprint_jax.data.rejects import RejectLog


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


@pytest.mark.parametrize(("processes", "count"), [(2, 40), (3, 41), (3, 2)])
def test_processes_share_a_survey(processes, count, tmp_path, monkeypatch):
    """Parts of 16 images."""
    monkeypatch.setattr(surveying, "PART", 16)
    measured = [[] for _ in range(processes)]

    class Counted(Pictures):
        def measure(self, index):
            if (index := int(index)) not in self._rejected:
                measured[self.process].append(index)
            return super().measure(index)

    def run(process, folder, count=count):
        source = Counted(count, (1, 21))
        source.process = process
        log = RejectLog(None, 1.0, process)
        sizes = [(8, 16), (16, 8), (8, 8)]
        found = surveying.survey(source, sizes, log, threads=2, cache_dir=folder)
        return found.counts.tolist(), found.select([0, 1, 2]).hash(), sorted(log._found)

    folders = [tmp_path / str(process) for process in range(processes)]
    first, *others = run_processes(processes, run, folders)
    # All know it now; then one process knows something else, and in the end sees other images.
    measured_once = [*map(len, measured)]
    assert run_processes(processes, run, folders) == [first] * processes
    assert [*map(len, measured)] == measured_once
    (kept,) = folders[0].iterdir()
    kept.write_bytes(bytes(count))
    assert run_processes(processes, run, folders) == [first] * processes
    assert [*map(len, measured)] == [2 * each for each in measured_once]
    counts = [count + 1, *[count] * (processes - 1)]
    with pytest.raises(UserError, match="process 1 sees other images in pictures than process 0"):
        run_processes(processes, run, folders, counts)
    for each, once in zip(measured, measured_once, strict=True):
        del each[once:]
    assert all(other == first for other in others)
    good = [index for index in range(count) if index not in (1, 21)]
    assert sorted(index for each in measured for index in each) == good
    assert max(map(len, measured)) <= -(-count // processes) + 1
    measured[0].clear()
    assert run(0, tmp_path / "alone") == first and measured[0] == good
