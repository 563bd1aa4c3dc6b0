"""Programs of many batch shapes, compiled in the background of a run."""

import threading
import weakref
from types import SimpleNamespace

import jax
import pytest
from helpers.runs import tiny

from sprint_jax.core.errors import UserError
from sprint_jax.parallel.sharding import make_mesh
from sprint_jax.training.setup import abstract_run
from sprint_jax.training.stages import COMPILERS, compile_updates, lower_updates


def shapes(*heights):
    return [{"latents": jax.ShapeDtypeStruct((8, height, 4, 3), "float32")} for height in heights]


def program(name):
    return SimpleNamespace(compile=lambda: name)


def test_the_first_shape_waits_for_no_other():
    """The second is held up until it is asked for; the third fails where it is asked for, and nowhere else."""
    first, second, third = batches = shapes(4, 8, 12)
    go, traced = threading.Event(), []

    def lower(batch):
        traced.append(batch["latents"].shape[1])
        assert go.wait(60)
        if batch is third:
            raise UserError("no such shape")
        return [program("update of 8"), program("critic of 8")]

    with compile_updates([program("update of 4")], lower, batches) as updates:
        assert updates(first) == ["update of 4"]
        assert updates(second, wait=False) is None
        go.set()
        assert updates(second) == ["update of 8", "critic of 8"] == updates(second, wait=False)
        with pytest.raises(UserError, match="no such shape"):
            updates(third)
    assert traced == [8, 12]


def test_a_run_that_ends_early_compiles_nothing_more():
    batches, traced, go = shapes(*range(1, 200)), [], threading.Event()

    def lower(batch):
        traced.append(batch)
        assert go.wait(60)
        return []

    with compile_updates([program("update")], lower, batches) as updates:
        updates(batches[0])
        threading.Timer(0.5, go.set).start()
    assert len(traced) <= COMPILERS


def test_a_bound_gives_up_what_was_not_asked_for_the_longest():
    a, b, c, d = batches = shapes(4, 8, 12, 16)
    traced, alive = [], weakref.WeakSet()

    class Program:
        def compile(self):
            made = Program()
            alive.add(made)
            return made

    def lower(batch):
        traced.append(batch["latents"].shape[1])
        return [Program()]

    with compile_updates(lower(a), lower, batches, most=3) as updates:
        for batch in (b, c):  # the most frequent are compiled at once
            updates(batch)
        assert traced == [4, 8, 12] and len(alive) == 3
        assert updates(d) and traced.pop() == 16 and len(alive) == 3
        for batch in (a, c, d):
            updates(batch)
        assert traced == [4, 8, 12]
        updates(b)
        updates(d)
        assert traced == [4, 8, 12, 8] and len(alive) == 3
        updates(a)  # the first stays, however long it was not asked for
        updates(c)
        assert traced == [4, 8, 12, 8, 12] and len(alive) == 3


@pytest.mark.slow
def test_runs_that_differ_in_their_seed_share_their_programs(tmp_path):
    """A sweep over seeds compiles once: the cache of programs knows them by their text."""

    def programs(seed):
        c = tiny("configs/digits.py:student,small,sprint", tmp_path, seed=seed)
        lowered = lower_updates(c, *abstract_run(c, make_mesh(devices=jax.devices()[:1])))
        return [each.as_text() for each in lowered]

    first, other = programs(0), programs(2**32 - 1)
    assert len(first) == 2 and first == other
