"""Checkpoints: Orbax's CheckpointManager, with fingerprints and with errors that say what to do.

A checkpoint ``DIRECTORY/STEP`` holds two items: ``state`` (every leaf of the train state) and ``meta`` (a JSON
record: the caller's meta, a table of all leaves with shape, dtype and hash, and the hash of the record itself).
Orbax writes into a temporary directory and renames it when all is there. Neither Orbax nor TensorStore notices
a flipped bit in an array: here the hashes of what was restored must equal those taken before saving.

A state of up to `ASYNC_GB` per process is copied to the host and written while training goes on. A larger one
is written a piece at a time, and `save` returns when all is on disk: Orbax can bound that copy or let the
caller go on at once, not both. benchmarks/checkpoint_memory.py measures it.
"""

import contextlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import flax
import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from ..core.errors import UserError
from ..core.files import differences
from ..core.fingerprint import describe, digest, leaf_table, nonfinite_leaves
from ..core.storage import AnyPath, absolute, as_path
from . import object_store, orbax_io
from .orbax_io import Damaged, on_every_process, one_line

Tree = Any
Meta = dict[str, Any]
ASYNC_GB = 4.0  # of a state per process that may be copied to the host at once, 10**9 bytes


def _read_record(checkpoint: epath.Path) -> dict[str, Any]:
    """The record of a checkpoint: ``meta``, ``leaves``, ``digest``; raises `Damaged`."""
    record = on_every_process(lambda: orbax_io.read_json(checkpoint))
    if not isinstance(record, dict) or set(record) != {"meta", "leaves", "digest"}:
        raise Damaged("it was not written by sprint_jax")
    if record["digest"] != digest([record["meta"], record["leaves"]]):
        raise Damaged("its meta differs from the hash that was saved with it")
    if record["meta"].get("step") != int(checkpoint.name):
        raise Damaged(f"it is of step {record['meta'].get('step')}: a copy under another number")
    return record


def _read_tree(checkpoint: epath.Path, leaves: dict[str, Any], target: Tree) -> Tree:
    """The arrays of ``target``, ShapeDtypeStructs with shardings; raises `Damaged` if not as saved."""
    wanted, structure = jax.tree.flatten(target)
    names = [name.replace("/", ".") for name in describe(target)]
    arrays = on_every_process(lambda: orbax_io.read_arrays(checkpoint, names, wanted))
    tree = jax.tree.unflatten(structure, arrays)
    found = leaf_table(tree)
    bad = [name for name, entry in found.items() if leaves[name] != entry]
    if bad:
        raise Damaged(f"{len(bad)} of {len(found)} leaves differ from their hash, first {bad[0]}")
    return tree


def _json_value(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _signatures(leaves: dict[str, Any]) -> dict[str, str]:
    return {name: f"{entry['dtype']}{entry['shape']}" for name, entry in leaves.items()}


def _check_same(checkpoint: epath.Path, expected: Meta, found: Meta) -> None:
    """Raises UserError, naming the first difference, unless all that is expected is found."""
    same_keys = {name: found.get(name, "absent") for name in expected}
    if different := list(differences(same_keys, expected)):
        name, saved, now = different[0]
        more = f" (and {len(different) - 1} more)" if len(different) > 1 else ""
        raise UserError(
            f"checkpoint {checkpoint}: {name} is {saved!r} in the checkpoint but {now!r} in this run{more}; "
            "restore that value or use another --workdir"
        )


def _abstract(leaf: Any, sharding: jax.sharding.Sharding | None = None) -> jax.ShapeDtypeStruct:
    sharding = sharding or getattr(leaf, "sharding", None)
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


class Checkpoints(contextlib.AbstractContextManager):
    """The checkpoints of one run, for its training loop. Every process calls every method.

    Use as a context manager or call `close`; a process that ends before may lose the newest save.

    Args:
      directory: made if missing; usually WORKDIR/checkpoints.
      keep: how many of the newest checkpoints stay. An old one goes when the new one is complete.
      keep_period: multiples of this step stay as well; None: none.
      every: `save` acts on multiples of this step; None: on every call.
      async_gb: a larger state (10**9 bytes per process) is streamed, see above.
    """

    def __init__(
        self,
        directory: str,
        *,
        keep: int,
        keep_period: int | None = None,
        every: int | None = None,
        async_gb: float = ASYNC_GB,
    ):
        if keep < 1 or (every is not None and every < 1):
            raise UserError(f"checkpoints: keep={keep} and every={every} must be at least 1")
        self.directory = epath.Path(absolute(as_path(directory)))
        self.every = every
        self._async_bytes = async_gb * 1e9
        self._quiet = contextlib.ExitStack()
        self._quiet.enter_context(orbax_io.quiet_logs())
        try:
            self._manager = _writer_of(self.directory)(self.directory, keep, keep_period)
        except OSError as error:
            self._quiet.close()
            raise UserError(f"checkpoint directory {self.directory}: {one_line(error)}") from error

    def __exit__(self, *exception) -> None:
        self.close()

    def save(self, step: int, state: Tree, meta: Meta, force: bool = False) -> bool:
        """Starts to write a checkpoint, or writes a large one; the arrays may be donated right after.

        Args:
          step: a multiple of ``every``, else nothing is done unless ``force``.
          meta: JSON-able dict, saved together with ``step``.

        Returns whether a save was started; False also when this step is already there. Raises UserError
        when this or the previous save cannot be written (disk full, no permission).
        """
        due = force or self.every is None or step % self.every == 0
        if not due or step in self._manager.all_steps():
            return False
        content = [_json_value({**meta, "step": int(step)}), leaf_table(state)]
        record = {"meta": content[0], "leaves": content[1], "digest": digest(content)}
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / jax.process_count()
        with self._write_errors():
            return self._manager.save(step, state, record, size > self._async_bytes)

    @contextlib.contextmanager
    def _write_errors(self) -> Iterator[None]:
        try:
            yield
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:
            # TensorStore reports a full disk as ValueError, other stores as other classes.
            raise UserError(
                f"a checkpoint in {self.directory} could not be written ({one_line(error)}); "
                "is the disk full? The complete ones were left alone",
                abrupt=True,  # Orbax's other threads wait for minutes for files that will not come.
            ) from error

    def restore_latest(
        self, abstract_state: Tree, expect_meta: Meta | None = None
    ) -> tuple[Tree, Meta] | None:
        """Returns (state, meta) of the newest whole checkpoint; None when the directory has none at all.

        Leaves are bit for bit as saved, and placed as ``abstract_state`` says. A damaged checkpoint is
        named in a warning on stderr and the one before is used; the damaged one is then renamed to
        ``STEP.damaged`` to make way for the run's next saves.

        Args:
          abstract_state: tree of ShapeDtypeStructs with shardings (or of arrays); any mesh. Without
            a sharding a leaf goes to the first local device.
          expect_meta: keys that the checkpoint's meta must have with equal values; nested dicts are
            compared whole.

        Raises:
          UserError: meta or leaves that do not fit, naming them; or checkpoints of which none is
            whole, naming the directory.
        """
        self.wait()
        target = jax.tree.map(_abstract, abstract_state)
        expected = _json_value(expect_meta or {}) | {"leaves": _signatures(describe(target))}

        def attempt(checkpoint: epath.Path) -> tuple[Tree, Meta]:
            record = _read_record(checkpoint)
            leaves = {"leaves": _signatures(record["leaves"])}
            _check_same(checkpoint, expected, record["meta"] | leaves)
            return _read_tree(checkpoint, record["leaves"], target), record["meta"]

        result, damaged = _newest_whole(self.directory, self._manager.all_steps(), attempt)
        self._set_aside(damaged)
        return result

    def _set_aside(self, steps: list[int]) -> None:
        for step in steps if jax.process_index() == 0 else ():
            taken = len(list(self.directory.glob(f"{step}.damaged*")))
            name = f"{step}.damaged" + (f".{taken}" if taken else "")
            (self.directory / str(step)).rename(self.directory / name)
        if steps:
            multihost_utils.sync_global_devices("sprint_jax.checkpoint.set_aside")
            self._manager.reload()

    def wait(self) -> None:
        """Waits until the last save is complete; raises UserError if it could not be written."""
        with self._write_errors():
            self._manager.wait()

    def close(self) -> None:
        """Waits, then frees threads; nothing else may be called afterwards."""
        with self._quiet, self._write_errors():
            self._manager.close()


def complete_steps(directory: epath.Path) -> list[int]:
    """The steps of the whole checkpoints in a directory."""
    if orbax_io.writes_orbax(directory):
        return ocp.utils.checkpoint_steps(directory)
    return object_store.complete_steps(directory)


def _writer_of(directory: epath.Path):
    if orbax_io.writes_orbax(directory):
        return orbax_io.OrbaxWriter
    return object_store.ObjectStoreWriter


def saved_steps(workdir: AnyPath) -> list[int]:
    """The steps of a workdir's checkpoints, whole or damaged; none where there is no workdir."""
    directory = epath.Path(workdir) / "checkpoints"
    return sorted(complete_steps(directory)) if directory.is_dir() else []


def _newest_whole(
    directory: epath.Path,
    steps: Iterable[int],
    attempt: Callable[[epath.Path], tuple[Tree, Meta]],
) -> tuple[tuple[Tree, Meta] | None, list[int]]:
    """The result of the first attempt, newest step first, that finds no damage; and the damaged steps."""
    damaged = []
    # Orbax passes over a file in the place of a checkpoint; here it is named.
    there = directory.iterdir() if directory.is_dir() else ()
    files = [int(path.name) for path in there if path.name.isdigit() and not path.is_dir()]
    for step in sorted({*steps, *files}, reverse=True):
        try:
            return attempt(directory / str(step)), damaged
        except Damaged as error:
            if jax.process_index() == 0:
                line = f"checkpoint {directory / str(step)} is damaged and not used: {error}"
                print(f"warning: {line}", file=sys.stderr, flush=True)
            damaged.append(step)
    if damaged:
        raise UserError(
            f"{directory}: none of the checkpoints {damaged[::-1]} is whole (see the warnings); "
            "put a good copy there, or start anew in another --workdir"
        )
    return None, []


def _nested(leaves: dict[str, Any], field: str) -> Tree:
    """The subtree ``field`` of a table of leaves as nested dicts of ShapeDtypeStructs."""
    return flax.traverse_util.unflatten_dict(
        {
            tuple(name.split("/")[1:]): jax.ShapeDtypeStruct(entry["shape"], entry["dtype"])
            for name, entry in leaves.items()
            if name.startswith(f"{field}/")
        }
    )


def load_params(
    workdir: str,
    which: str = "ema",
    shardings: Tree | Callable[[Tree], Tree] | None = None,
    allow_nonfinite: bool = False,
) -> tuple[Tree, Meta]:
    """Loads the parameters of the newest whole checkpoint of a workdir; changes nothing on disk.

    Args:
      which: 'ema' (the average) or 'raw' (the trained parameters themselves).
      shardings: where the leaves go: one Sharding, a tree (or tree prefix) of them, or a function
        from the tree of ShapeDtypeStructs to one of these; None: the first local device.
      allow_nonfinite: takes NaN and infinity as well.

    Returns:
      (nested dict of jax arrays with the saved dtypes, meta with key ``step``).

    Raises:
      UserError: not a workdir, no such parameters, some that are not finite, or no whole checkpoint.
    """
    if which not in ("ema", "raw"):
        raise UserError(f"params {which!r} is not known; choose 'ema' or 'raw'", exit_code=2)
    field = "params" if which == "raw" else "ema"
    directory = epath.Path(absolute(as_path(workdir))) / "checkpoints"
    if not directory.is_dir():
        raise UserError(f"{workdir} is not a training workdir: it has no directory checkpoints")

    def attempt(checkpoint: epath.Path) -> tuple[Tree, Meta]:
        record = _read_record(checkpoint)
        tree = _nested(record["leaves"], field)
        if not tree:
            raise UserError(f"checkpoint {checkpoint} has no {which} parameters")
        wanted = shardings(tree) if callable(shardings) else shardings
        if wanted is not None:
            tree = jax.tree.map(_abstract, tree, jax.tree.broadcast(wanted, tree))
        target = {field: jax.tree.map(_abstract, tree)}
        params = _read_tree(checkpoint, record["leaves"], target)[field]
        bad = [] if allow_nonfinite else nonfinite_leaves(params)
        if bad:
            more = f" and {len(bad) - 1} more" if bad[1:] else ""
            raise UserError(f"checkpoint {checkpoint}: {field}/{bad[0]}{more} hold NaN or infinity")
        return params, record["meta"]

    result, _ = _newest_whole(directory, complete_steps(directory), attempt)
    if result is None:
        raise UserError(f"{directory} has no complete checkpoint yet; train longer")
    return result
