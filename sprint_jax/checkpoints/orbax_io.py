"""Checkpoints on disk: Orbax writes them, TensorStore reads their arrays, process by process.

Orbax's own reader meets the other processes in barriers while it reads, so that one that finds damage
would leave the others waiting. Its format is plain: one zarr array a leaf in an OCDBT database.
"""

import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from jax.experimental import multihost_utils

Tree = Any
Result = TypeVar("Result")
STREAM_GB = 0.25  # of a large state on the host at a time while it is written, 10**9 bytes


class Damaged(Exception):
    """This checkpoint cannot be used, but an older one may; the message is one line."""


def one_line(error: BaseException) -> str:
    """Returns class and message of an error on one line of at most about 300 characters."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 300 else f"{text[:140]} ... {text[-140:]}"


@contextlib.contextmanager
def quiet_logs() -> Iterator[None]:
    """Drops Orbax's own log records, tracebacks among them: what goes wrong arrives as an exception as well."""

    def from_elsewhere(record: logging.LogRecord) -> bool:
        return "orbax" not in record.pathname

    logger = logging.getLogger("absl")
    logger.addFilter(from_elsewhere)
    try:
        yield
    finally:
        logger.removeFilter(from_elsewhere)


def make_writer(directory: epath.Path, keep: int) -> ocp.CheckpointManager:
    """Returns a manager that keeps the newest ``keep`` checkpoints and saves a state in one of two ways.

    With ``ocp.args.StandardSave`` the whole state is copied to the host at once, and written in the
    background. With `streamed` at most `STREAM_GB` of it, or one larger leaf, are on the host at a time;
    the caller must then wait before it overwrites the arrays.
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


def streamed(state: Tree) -> ocp.args.PyTreeSave:
    """Returns the argument that makes the manager of `make_writer` stream a state."""
    # A data file is built in memory, up to this size; TensorStore's own choice is 2 GB.
    return ocp.args.PyTreeSave(state, ocdbt_target_data_file_size=int(STREAM_GB * 1e9) // 2)


def read_json(checkpoint: epath.Path) -> Any:
    """Reads the item ``meta`` of a checkpoint."""
    return json.loads((checkpoint / "meta" / "metadata").read_text())


def read_arrays(
    checkpoint: epath.Path, names: Sequence[str], targets: Sequence[jax.ShapeDtypeStruct]
) -> list[jax.Array]:
    """Reads arrays of the item ``state`` of a checkpoint, one after the other; ValueError for damage.

    Args:
      names: keys on the way to each, joined by dots, such as ``params.out.kernel``.
      targets: their shapes and shardings; each process reads the shards of its own devices.
    """
    files = {"driver": "ocdbt", "base": f"{(checkpoint / 'state').as_uri()}/"}
    stores = [ts.open({"driver": "zarr", "kvstore": files | {"path": f"{n}/"}}) for n in names]
    arrays = []
    for target, opening in zip(targets, stores, strict=True):
        store = opening.result()
        places = target.sharding.addressable_devices_indices_map(target.shape)
        # Devices may share a shard; slices are no keys before Python 3.12.
        different = {str(at): at for at in places.values()}
        parts = {key: store[at].read() for key, at in different.items()}
        shards = [jax.device_put(parts[str(at)].result(), device) for device, at in places.items()]
        array = jax.make_array_from_single_device_arrays(target.shape, target.sharding, shards)
        arrays.append(array)
    return arrays


def on_every_process(read: Callable[[], Result]) -> Result:
    """Returns what ``read`` returns; raises `Damaged` on all processes if it fails on one of them."""
    result, reason = None, "another process could not read it"
    try:
        result = read()
    except (ValueError, KeyError, IndexError, OSError) as error:
        # Truncated, missing and altered files; out of memory is a RuntimeError, and no damage.
        reason = one_line(error)
    if not np.all(multihost_utils.process_allgather(np.asarray(result is not None))):
        raise Damaged(reason)
    return result
