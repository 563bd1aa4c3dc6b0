"""Checkpoints in buckets that Orbax does not write to (S3): zarr arrays, and marks that make them count.

    STEP/state/LEAF/...    one zarr array a leaf, with a chunk for each shard
    STEP/meta/metadata     the JSON record
    STEP/done/K            process K has written all that is its own; last

A checkpoint counts when as many processes have left their mark as each mark says. Orbax's own way for local
disks ends with a rename, which a bucket does not have.
"""

import json
import os
import re
import sys
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import tensorstore as ts
from etils import epath
from jax.experimental import multihost_utils

from ..core.fingerprint import describe
from ..core.storage import filesystem, is_provider_error
from .orbax_io import kvstore, one_line

Tree = Any
Piece = tuple[tuple[slice, ...], np.ndarray]  # a shard on the host, and its place in the whole
OTHERS_SECONDS = 600.0  # that process 0 waits for the others' marks before it gives up to tidy


def complete_steps(directory: epath.Path) -> list[int]:
    """The steps of the checkpoints that count, increasing."""
    marks = _marks(directory)
    return sorted(step for step, done in marks.items() if done and len(done) == min(done.values()))


def _marks(directory: epath.Path) -> dict[int, dict[str, int]]:
    """Step -> name of a mark -> number of processes; empty for steps without marks."""
    files, root = filesystem(directory), os.fspath(directory).partition("://")[2]
    found: dict[int, dict[str, int]] = {}
    for name in files.find(os.fspath(directory)):
        match = re.fullmatch(r"(\d+)/(?:done/(\d+)-of-(\d+)|.*)", name[len(root) :].strip("/"))
        if match:
            done = found.setdefault(int(match[1]), {})
            if match[2]:
                done[match[2]] = int(match[3])
    return found


class ObjectStoreWriter:
    """Writes checkpoints in the background, and keeps the newest ``keep``. Every process calls every method.

    See `orbax_io.OrbaxWriter`, which does the same for disks and GCS.
    """

    def __init__(self, directory: epath.Path, keep: int, keep_period: int | None = None):
        self._directory, self._keep, self._keep_period = directory, keep, keep_period
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running: Future | None = None
        self._context = ts.Context()  # one, so that the store's clients are shared
        if jax.process_index() == 0:
            whole = complete_steps(directory)
            self._remove(step for step in _marks(directory) if step not in whole)
        multihost_utils.sync_global_devices("sprint_jax.object_store.open")
        self.reload()

    def all_steps(self) -> list[int]:
        """The steps that are there, or on their way."""
        return sorted(self._steps)

    def save(self, step: int, state: Tree, record: dict[str, Any], stream: bool) -> bool:
        """Starts to write a checkpoint. With ``stream`` one leaf after the other is copied to the host, and
        all are written at the end; else all are copied first, and written while the caller goes on."""
        self.wait()
        leaves = zip(describe(state), jax.tree.leaves(state), strict=True)
        pieces = (
            (name.replace("/", "."), leaf.shape, leaf.dtype, *_shards(leaf))
            for name, leaf in leaves
        )
        groups = ([piece] for piece in pieces) if stream else [list(pieces)]
        self._running = self._pool.submit(self._write, step, groups, record)
        self._steps.add(step)
        if stream:
            self.wait()
        return True

    def _write(self, step: int, leaves: Iterable[list[tuple]], record: dict[str, Any]) -> None:
        folder = self._directory / str(step)
        for group in leaves:
            stores = [
                ts.open(
                    {"driver": "zarr", "kvstore": kvstore(folder, f"state/{name}")},
                    create=True,
                    open=True,
                    dtype=ts.dtype(dtype),
                    shape=shape,
                    chunk_layout=ts.ChunkLayout(chunk_shape=chunk),
                    context=self._context,
                )
                for name, shape, dtype, chunk, _ in group
            ]
            writes = [
                store.result()[place].write(value)
                for store, (*_, pieces) in zip(stores, group, strict=True)
                for place, value in pieces
            ]
            for write in writes:
                write.result()
        count = jax.process_count()
        if jax.process_index() == 0:
            (folder / "meta" / "metadata").write_text(json.dumps(record))
        (folder / "done" / f"{jax.process_index()}-of-{count}").write_text("done\n")
        if jax.process_index() == 0:
            try:
                self._tidy(step)
            except Exception as error:
                if not is_provider_error(error):
                    raise
                print(f"old checkpoints are not removed: {one_line(error)}", file=sys.stderr)

    def _tidy(self, step: int) -> None:
        """Removes old checkpoints once the new one counts."""
        deadline = time.monotonic() + OTHERS_SECONDS
        while step not in (whole := complete_steps(self._directory)):
            if time.monotonic() > deadline:
                return
            time.sleep(1.0)
        every = self._keep_period
        self._remove(old for old in whole[: -self._keep] if not every or old % every)

    def _remove(self, steps: Iterable[int]) -> None:
        files = filesystem(self._directory)
        for step in steps:
            folder = os.fspath(self._directory / str(step))
            found = files.find(folder)
            for part in ([f for f in found if "/done/" in f], found):
                if part := [file for file in part if files.exists(file)]:
                    files.rm(part)

    def wait(self) -> None:
        """Waits for the save that is running; raises what went wrong in it."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def reload(self) -> None:
        """Looks again at what is there."""
        self._steps = set(complete_steps(self._directory))

    def close(self) -> None:
        """Waits, and ends the thread."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()


def _shards(leaf: jax.Array) -> tuple[tuple[int, ...], list[Piece]]:
    """The shape of a shard, and those that this process writes, on the host."""
    mine = [shard for shard in leaf.addressable_shards if shard.replica_id == 0]
    return leaf.sharding.shard_shape(leaf.shape), [(s.index, np.asarray(s.data)) for s in mine]
