"""Reading through Orbax: one exception for whatever damage it meets, and no debris on stderr."""

import contextlib
import gc
import logging
import math
import sys
import time
import types
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

STREAM_GB = 0.25  # of a large state on the host at a time, 10**9 bytes


class Damaged(Exception):
    """This checkpoint cannot be used, but an older one may; the message is one line."""


def one_line(error: BaseException) -> str:
    """Class and message of an error on one line, at most about 300 characters."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 300 else f"{text[:140]} ... {text[-140:]}"


@contextlib.contextmanager
def quiet_logs() -> Iterator[None]:
    """Drops Orbax's own log records: what goes wrong arrives as an exception as well."""

    def from_elsewhere(record: logging.LogRecord) -> bool:
        return "orbax" not in record.pathname

    logger = logging.getLogger("absl")
    logger.addFilter(from_elsewhere)
    try:
        yield
    finally:
        logger.removeFilter(from_elsewhere)


def _is_orbax_coroutine(item: object) -> bool:
    # By type alone: asking an object for its class runs code in libraries that wrap theirs, such as torch.
    return type(item) is types.CoroutineType and "orbax" in item.cr_code.co_filename


@contextlib.contextmanager
def quiet_failures() -> Iterator[None]:
    """Keeps the debris of a failed Orbax read or write off stderr.

    When one array fails, Orbax abandons the coroutines of the others; Python and TensorStore report
    each of them through the hook for errors that nobody can catch, after the real error.
    """

    def drop_debris(unraisable) -> None:
        closed_loop = (
            isinstance(unraisable.exc_value, RuntimeError)
            and str(unraisable.exc_value) == "Event loop is closed"
        )
        if not (closed_loop or _is_orbax_coroutine(unraisable.object)):
            previous(unraisable)

    def not_debris(record: logging.LogRecord) -> bool:
        return "was never retrieved" not in record.getMessage()

    previous, sys.unraisablehook = sys.unraisablehook, drop_debris
    logger = logging.getLogger("asyncio")
    logger.addFilter(not_debris)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
            yield
    finally:
        sys.unraisablehook = previous
        logger.removeFilter(not_debris)


def await_debris(seconds: float) -> None:
    """After a failure: waits until the abandoned coroutines are gone, inside `quiet_failures`.

    TensorStore's threads hold them until their reads and writes end.
    """
    deadline = time.monotonic() + seconds
    gc.collect()
    while time.monotonic() < deadline and any(map(_is_orbax_coroutine, gc.get_objects())):
        time.sleep(0.02)
        gc.collect()


def make_writer(directory: epath.Path, keep: int) -> ocp.CheckpointManager:
    """A manager that keeps the newest ``keep`` checkpoints and saves a state in one of two ways.

    With ``ocp.args.StandardSave`` the whole state is copied to the host at once, and written in the
    background. With ``ocp.args.PyTreeSave`` at most `STREAM_GB` of it are on the host at a time (or one
    leaf, where that is larger); the caller must then wait before it overwrites the arrays.
    """
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    registry.add("state", ocp.args.StandardSave)
    # Without a function that says which leaves may wait, Orbax lets none wait and ignores the limit.
    streaming = ocp.PyTreeCheckpointHandler(
        save_device_host_concurrent_gb=STREAM_GB, is_prioritized_key_fn=lambda path: False
    )
    registry.add("state", ocp.args.PyTreeSave, streaming)
    registry.add("meta", ocp.args.JsonSave)
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
    return ocp.CheckpointManager(directory, options=options, handler_registry=registry)


def streamed(state: Any) -> ocp.args.PyTreeSave:
    """What makes the manager of `make_writer` stream a state."""
    # A data file is built in memory, up to this size; TensorStore's own choice is 2 GB.
    return ocp.args.PyTreeSave(state, ocdbt_target_data_file_size=int(STREAM_GB * 1e9) // 2)


def open_reader(directory: epath.Path, target: Any = ()) -> ocp.CheckpointManager:
    """A manager that only reads, each process by itself.

    Orbax's own manager meets the other processes in barriers while it reads; one process that finds
    damage would leave the others waiting there. `read` makes them agree instead.

    Args:
      target: what will be read, ShapeDtypeStructs with shardings: `STREAM_GB` of it are on the host at a
        time, or twice the largest shard, without which Orbax refuses to read that.
    """
    process = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=process, active_processes={process}, barrier_sync_key_prefix=f"read{process}"
    )
    options = ocp.CheckpointManagerOptions(
        read_only=True, save_interval_steps=0, create=False, multiprocessing_options=alone
    )
    largest = max(map(_shard_bytes, jax.tree.leaves(target)), default=0)
    state = ocp.PyTreeCheckpointHandler(
        restore_concurrent_gb=max(STREAM_GB, 2 * largest / 1e9),
        multiprocessing_options=alone,
    )
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    registry.add("state", ocp.args.PyTreeRestore, state)
    meta = ocp.JsonCheckpointHandler(multiprocessing_options=alone)
    registry.add("meta", ocp.args.JsonRestore, meta)
    return ocp.CheckpointManager(directory, options=options, handler_registry=registry)


def _shard_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape
    return math.prod(shape) * np.dtype(leaf.dtype).itemsize


def restore_args(target: Any) -> ocp.args.PyTreeRestore:
    """Reads the leaves of ``target`` (ShapeDtypeStructs with shardings) and no others."""
    placed = ocp.checkpoint_utils.construct_restore_args(target)
    return ocp.args.PyTreeRestore(item=target, restore_args=placed, partial_restore=True)


def on_every_process(ok: bool) -> bool:
    """True when ``ok`` is true on all processes, so that all of them take the same checkpoint."""
    if jax.process_count() == 1:
        return ok
    return bool(np.all(multihost_utils.process_allgather(np.asarray(ok))))


def read(manager: ocp.CheckpointManager, step: int, args: ocp.args.Composite) -> Any:
    """``manager.restore`` that raises `Damaged` on all processes if it fails on one of them."""
    result, reason = None, "another process could not read it"
    with quiet_failures():
        try:
            result = manager.restore(step, args=args)
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise  # The device or host is at fault (out of memory), not the checkpoint.
        except Exception as error:
            # Truncated, missing and altered files surface as ValueError, KeyError, JSONDecodeError,
            # FileNotFoundError and, for array data, as a bare Exception: no narrower class exists.
            reason = one_line(error)
        if result is None:
            await_debris(seconds=5.0)
    if not on_every_process(result is not None):
        raise Damaged(reason)
    return result
