"""Checkpoints on disk: Orbax writes them, TensorStore reads their arrays, process by process.

Orbax's own reader meets the other processes in barriers while it reads, so that one that finds damage
would leave the others waiting. Its format is plain: one zarr array a leaf in an OCDBT database.
"""

import contextlib
import json
import logging
import os
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


class OrbaxWriter:
    """Writes checkpoints by Orbax, and keeps the newest ``keep``. Every process calls every method.

    Args:
      keep_period: multiples of this step stay as well.
    """

    def __init__(self, directory: epath.Path, keep: int, keep_period: int | None = None):
        registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
        registry.add("state", ocp.args.StandardSave)
        # Without a function that says which leaves may wait, Orbax lets none wait and ignores the limit.
        streaming = ocp.PyTreeCheckpointHandler(
            save_device_host_concurrent_gb=STREAM_GB, is_prioritized_key_fn=lambda path: False
        )
        registry.add("state", ocp.args.PyTreeSave, streaming)
        registry.add("meta", ocp.args.JsonSave)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, keep_period=keep_period, cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(directory, options=options, handler_registry=registry)
        self.all_steps = self._manager.all_steps  # that are there, or on their way
        self.wait = (
            self._manager.wait_until_finished
        )  # raises what went wrong in the save that is running
        self.reload = self._manager.reload  # looks again at what is there
        self.close = self._manager.close

    def save(self, step: int, state: Tree, record: dict[str, Any], stream: bool) -> bool:
        """Starts to write a checkpoint: copies the state to the host at once, and goes on in the background.

        With ``stream`` at most `STREAM_GB` of it, or one larger leaf, are on the host at a time, and the call
        returns when all is written.
        """
        # A data file is built in memory, up to this size; TensorStore's own choice is 2 GB.
        size = int(STREAM_GB * 1e9) // 2
        item = (
            ocp.args.PyTreeSave(state, ocdbt_target_data_file_size=size)
            if stream
            else ocp.args.StandardSave(state)
        )
        args = ocp.args.Composite(state=item, meta=ocp.args.JsonSave(record))
        started = self._manager.save(step, args=args, force=True)
        if stream:
            self.wait()
        return started


def writes_orbax(directory: epath.Path) -> bool:
    """Whether Orbax can write there: on disks and on Google Cloud Storage, to this day not on S3."""
    return not os.fspath(directory).startswith("s3://")


def kvstore(folder: epath.Path, path: str = "") -> dict[str, Any]:
    """TensorStore's place of a folder, or of what lies below it."""
    name = os.fspath(folder / path) + "/"
    scheme, separator, rest = name.partition("://")
    if not separator:
        return {"driver": "file", "path": name}
    bucket, _, path = rest.partition("/")
    place = {"driver": {"gs": "gcs"}.get(scheme, scheme), "bucket": bucket, "path": path}
    # As botocore reads them, and TensorStore does not: stores that are not Amazon's.
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if scheme == "s3" and endpoint:
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        place |= {"endpoint": endpoint, "aws_region": region or "us-east-1"}
    if scheme == "s3" and "AWS_ACCESS_KEY_ID" in os.environ:
        place["aws_credentials"] = {"type": "environment"}  # else it looks, and logs, everywhere
    return place


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
    if writes_orbax(checkpoint):
        files = {"driver": "ocdbt", "base": kvstore(checkpoint / "state")}
        places = [files | {"path": f"{name}/"} for name in names]
    else:
        places = [kvstore(checkpoint, f"state/{name}") for name in names]
    context = ts.Context()  # one, so that a store's clients are shared
    stores = [ts.open({"driver": "zarr", "kvstore": place}, context=context) for place in places]
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
