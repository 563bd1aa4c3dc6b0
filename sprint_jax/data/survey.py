"""The survey of an image source: the bucket of every image, from its header."""

import hashlib
import os
import platform
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from tqdm import tqdm

from ..core.files import write_atomic
from ..core.pixels import nearest_size
from ..core.storage import AnyPath, in_bucket, read_range, size_of
from ..parallel.sharding import from_everyone
from .buckets import merge_sizes
from .members import Buckets, Surveyed
from .rejects import RejectLog
from .sources.records import Rejected, Source, check_same

CHUNK = 4096  # images whose headers a thread reads at a time
PART = 256 * CHUNK  # images that are handed to the threads at once


def survey(
    source: Source,
    sizes: Sequence[tuple[int, int]],
    log: RejectLog,
    *,
    threads: int,
    cache_dir: AnyPath,
) -> Surveyed:
    """Finds the size of every image, once: a byte an image is kept in a file of ``cache_dir``, and read there.

    Each process of a run looks at its share of the images, and gets the others' numbers from them; all call
    this together, with the same images.

    Args:
      sizes: (height, width) in pixels that images are cut to.
      log: gets the images that cannot be measured, every time.

    Returns:
      Of each record the number of its size, -1 for those that cannot be measured.
    """
    identity = hashlib.sha256(f"{source.identity} {list(sizes)}".encode()).hexdigest()
    dtype = np.dtype(np.int8 if len(sizes) < 128 else np.int16)
    path = cache_dir / f"survey-{identity[:16]}.{dtype.name}"
    log.count(len(source))
    rejected = set()

    def measure(index: int) -> int:
        try:
            _, size = source.measure(index)
        except Rejected as reason:
            log.add(reason, source.name)
            rejected.add(index)
            return -1
        return sizes.index(nearest_size(*size, sizes))

    numbers = _kept(path, dtype, len(source))
    if not _all_know(source, identity, numbers):
        numbers = np.empty(len(source), dtype)
        _measure_all(numbers, measure, f"sizes of {source.name}", threads)
        _keep(path, numbers)
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(source), PART):
            found = start + np.flatnonzero(numbers[start : start + PART] < 0)
            # What other processes and earlier runs rejected is in this one's log too.
            list(pool.map(measure, [index for index in found.tolist() if index not in rejected]))
    return Surveyed(numbers, len(sizes))


def _kept(path: AnyPath, dtype: np.dtype, count: int) -> np.ndarray | None:
    """The numbers in a file; None where there is none, or one that was cut short."""
    if not path.is_file() or size_of(path) != count * dtype.itemsize:
        return None
    if in_bucket(path):
        return np.frombuffer(read_range(path, 0, count * dtype.itemsize), dtype)
    return np.memmap(path, dtype, "r")


def _keep(path: AnyPath, numbers: np.ndarray) -> None:
    content = numbers.view(np.uint8).data
    if in_bucket(path):
        if jax.process_index() == 0:
            write_atomic(path, content)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # Several processes may come to this; each writes a file of its own.
    own = path.with_name(f"{path.name}.{platform.node()}-{os.getpid()}")
    write_atomic(own, content)
    own.replace(path)


def _all_know(source: Source, identity: str, numbers: np.ndarray | None) -> bool:
    """Whether all processes have the same survey already. UserError if they see other images."""
    check_same(source.name, hashlib.sha256(f"{identity} {len(source)}".encode()).digest())
    kept = bytes(32) if numbers is None else hashlib.sha256(numbers.data).digest()
    mine = np.frombuffer(kept, np.uint8)
    return bool((from_everyone(mine) == mine).all()) and numbers is not None


def _measure_all(
    numbers: np.ndarray, measure: Callable[[int], int], what: str, threads: int
) -> None:
    """Fills in the number of every image; each process measures its share and gets the others'."""
    me, processes = jax.process_index(), jax.process_count()

    def fill(rows: range) -> None:
        numbers[rows.start : rows.stop] = [measure(row) for row in rows]
        bar.update(len(rows) * processes)

    with (
        tqdm(desc=what, total=len(numbers), unit="image", delay=2, disable=me > 0) as bar,
        ThreadPoolExecutor(threads) as pool,
    ):
        for start in range(0, len(numbers), PART):
            part = numbers[start : start + PART]
            share = -(-len(part) // processes)
            mine = range(start, start + len(part))[me * share : (me + 1) * share]
            list(pool.map(fill, (mine[i : i + CHUNK] for i in range(0, len(mine), CHUNK))))
            found = np.zeros(share, numbers.dtype)
            found[: len(mine)] = numbers[mine.start : mine.stop]
            part[:] = from_everyone(found).reshape(-1)[: len(part)]


def join_sizes(
    surveys: Sequence[Surveyed],
    sizes: Sequence[tuple[int, int]],
    factor: int,
    batch_size: int,
) -> tuple[list[Buckets], str]:
    """Makes buckets of surveyed sources; images whose size fills no batch go to the next size that does.

    Args:
      sizes: those of the surveys; factor: pixels per latent along a side.

    Returns:
      Of each source its records by (h, w) of latents, and a line about sizes that were joined, or an empty one.
    """
    counts = sum(each.counts for each in surveys)
    target = merge_sizes(sizes, counts, batch_size)
    buckets = []
    for each in surveys:
        found = {}
        for kept in sorted(set(target)):
            members = each.select([k for k, t in enumerate(target) if t == kept])
            if len(members):
                height, width = sizes[kept]
                found[height // factor, width // factor] = members
        buckets.append(found)
    name = lambda k: f"{sizes[k][0]}x{sizes[k][1]}"  # noqa: E731
    moved = [k for k, t in enumerate(target) if t != k and counts[k]]
    if not moved:
        return buckets, ""
    joined = ", ".join(f"{name(k)} ({counts[k]}) to {name(target[k])}" for k in moved)
    return buckets, (
        f"{len(moved)} of {np.count_nonzero(counts)} sizes have too few images to fill a batch of "
        f"{batch_size}, and are cut to the next that do: {joined}"
    )
