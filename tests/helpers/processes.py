"""Threads of one process that stand for the processes of a run."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import pytest

from sprint_jax.data import survey
from sprint_jax.data.sources import records
from sprint_jax.parallel import sharding


def run_processes(count: int, work: Callable[..., Any], *each: list) -> list:
    """Calls ``work(process, ...)`` in so many threads at once, with an entry of each list; returns the results.

    There JAX gives their numbers, and `sharding.from_everyone` their arrays.
    """
    me, together, given = threading.local(), threading.Barrier(count, timeout=20), [None] * count

    def from_everyone(array):
        given[me.index] = array
        together.wait()
        found = np.stack(given)
        together.wait()
        return found

    def run(index, *rest):
        me.index = index
        return work(index, *rest)

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(count) as pool:
        for module in (records, sharding, survey):
            patch.setattr(module, "from_everyone", from_everyone)
        patch.setattr(jax, "process_count", lambda: count)
        patch.setattr(jax, "process_index", lambda: getattr(me, "index", 0))
        return list(pool.map(run, range(count), *each))
