"""Reading through Orbax: one exception for whatever damage it meets, and no debris on stderr."""

import contextlib
import gc
import logging
import sys
import time
import types
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

# Orbax's coroutines that read arrays.
READERS = ("_read_array_index", "_read_shard", "_read_and_create_array", "async_deserialize")


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


@contextlib.contextmanager
def _quiet_failures() -> Iterator[None]:
    """Keeps the debris of a failed Orbax read off stderr.

    When one array cannot be read, Orbax abandons the coroutines of the others; Python and
    TensorStore report each of them through the hook for errors that nobody can catch, after the
    real error.
    """

    def drop_debris(unraisable) -> None:
        debris = any(name in repr(unraisable.object) for name in READERS) or (
            isinstance(unraisable.exc_value, RuntimeError)
            and "Event loop is closed" in str(unraisable.exc_value)
        )
        if not debris:
            previous(unraisable)

    def not_asyncio_debris(record: logging.LogRecord) -> bool:
        return "was never retrieved" not in record.getMessage()

    previous, sys.unraisablehook = sys.unraisablehook, drop_debris
    logger = logging.getLogger("asyncio")
    logger.addFilter(not_asyncio_debris)
    try:
        yield
    finally:
        sys.unraisablehook = previous
        logger.removeFilter(not_asyncio_debris)


def _await_debris(seconds: float = 5.0) -> None:
    """Waits until the abandoned coroutines are gone, which should happen while the hook is ours.

    TensorStore's threads hold them until their reads end.
    """
    deadline = time.monotonic() + seconds
    gc.collect()
    while time.monotonic() < deadline and any(
        isinstance(item, types.CoroutineType) and item.cr_code.co_name.startswith(READERS)
        for item in gc.get_objects()
    ):
        time.sleep(0.02)
        gc.collect()


def on_every_process(ok: bool) -> bool:
    """True when ``ok`` is true on all processes, so that all of them take the same checkpoint."""
    if jax.process_count() == 1:
        return ok
    return bool(np.all(multihost_utils.process_allgather(np.asarray(ok))))


def read(manager: ocp.CheckpointManager, step: int, args: ocp.args.Composite) -> Any:
    """``manager.restore`` that raises `Damaged` on all processes if it fails on one of them."""
    result, reason = None, "another process could not read it"
    with _quiet_failures():
        try:
            result = manager.restore(step, args=args)
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise  # The device or host is at fault (out of memory), not the checkpoint.
        except Exception as error:
            # Truncated, missing and altered files surface as ValueError, KeyError, JSONDecodeError,
            # FileNotFoundError and, for array data, as a bare Exception: no narrower class exists.
            reason = one_line(error)
        if result is None:
            _await_debris()
    if not on_every_process(result is not None):
        raise Damaged(reason)
    return result
