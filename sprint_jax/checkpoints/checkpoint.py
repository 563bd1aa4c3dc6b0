"""Checkpoints: Orbax's CheckpointManager, with fingerprints and with errors that say what to do.

A checkpoint ``DIRECTORY/STEP`` holds two items: ``state`` (every leaf of the train state) and
``meta`` (a JSON record: the caller's meta, a table of all leaves with shape, dtype and hash, and
the hash of the record itself). Orbax writes asynchronously into a temporary directory and renames
it when all is there, so that a killed process leaves no half checkpoint under a step's name.

What the record adds: Orbax checks the index of its files but not the data in them (a flipped bit in
an array restores without a complaint), and it converts dtypes silently. Here the hashes of what was
restored must equal those taken before saving, and shapes, dtypes and meta are compared before any
array is read.

Memory of the host: a state of up to `ASYNC_GB` per process is copied there and written while training
goes on. Orbax can bound that copy or let the caller go on at once, not both, since arrays that still
wait on the device must not be overwritten. So a larger state is written a piece at a time and `save`
returns when all is on disk. Reading is in pieces as well, and hashes are computed on the devices, one
leaf after the other. benchmarks/checkpoint_memory.py measures all of this.
"""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from ..core.errors import UserError
from ..core.fingerprint import describe, digest, fingerprint, leaf_table
from .orbax_io import (
    Damaged,
    await_debris,
    make_writer,
    one_line,
    open_reader,
    quiet_failures,
    quiet_logs,
    read,
    restore_args,
    streamed,
)

__all__ = ["Checkpoints", "fingerprint", "load_params"]

Tree = Any
Meta = dict[str, Any]
ASYNC_GB = 4.0  # of a state per process that may be copied to the host at once, 10**9 bytes


def _warn(text: str) -> None:
    if jax.process_index() == 0:
        print(f"warning: {text}", file=sys.stderr, flush=True)


def _read_record(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    """The record of a checkpoint: ``meta``, ``leaves``, ``digest``; raises `Damaged`."""
    record = read(manager, step, ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
    if not isinstance(record, dict) or set(record) != {"meta", "leaves", "digest"}:
        raise Damaged("it was not written by sprint_jax")
    if record["digest"] != digest([record["meta"], record["leaves"]]):
        raise Damaged("its meta differs from the hash that was saved with it")
    return record


def _verify(leaves: dict[str, Any], tree: Tree, prefix: str = "") -> None:
    """Raises `Damaged` when restored leaves are not bit for bit those that were saved."""
    found = leaf_table(tree)
    bad = [prefix + name for name, entry in found.items() if leaves[prefix + name] != entry]
    if bad:
        raise Damaged(f"{len(bad)} of {len(found)} leaves differ from their hash, first {bad[0]}")


def _json_value(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _differences(expected: Any, found: Any, key: str) -> Iterator[str]:
    """One phrase per leaf of nested dicts that is not equal."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for name in sorted(expected.keys() | found.keys()):
            yield from _differences(
                expected.get(name, "absent"), found.get(name, "absent"), f"{key}.{name}"
            )
    elif expected != found:
        yield f"{key} is {found!r} in the checkpoint but {expected!r} in this run"


def _check_meta(where: str, expected: Meta, found: Meta) -> None:
    for name, value in _json_value(expected).items():
        for difference in _differences(value, found.get(name, "absent"), name):
            raise UserError(f"{where}: {difference}; restore that value or use another --workdir")


def _check_leaves(where: str, expected: dict[str, Any], found: dict[str, Any]) -> None:
    problems = []
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            problems.append(f"leaf {name} is missing in the checkpoint")
        elif name not in expected:
            problems.append(f"leaf {name} is in the checkpoint but not in this run's state")
        elif any(expected[name][key] != found[name][key] for key in ("shape", "dtype")):
            old, new = (f"{t[name]['dtype']}{t[name]['shape']}" for t in (found, expected))
            problems.append(f"leaf {name} is {old} in the checkpoint but {new} in this run")
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(f"{where}: {problems[0]}{more}; was the config changed?")


def _abstract(leaf: Any, sharding: jax.sharding.Sharding | None = None) -> jax.ShapeDtypeStruct:
    sharding = sharding or getattr(leaf, "sharding", None)
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


class Checkpoints:
    """The checkpoints of one run, for its training loop. Every process calls every method.

    Use as a context manager or call `close`; a process that ends before may lose the newest save.

    Args:
      directory: made if missing; usually WORKDIR/checkpoints.
      keep: how many of the newest checkpoints stay. An old one goes when the new one is complete.
        With 1 there is nothing to fall back on when the newest is damaged.
      every: `save` acts on multiples of this step; None: on every call.
      async_gb: a larger state (10**9 bytes per process) is streamed, see above.
    """

    def __init__(
        self, directory: str, *, keep: int, every: int | None = None, async_gb: float = ASYNC_GB
    ):
        if keep < 1 or (every is not None and every < 1):
            raise UserError(f"checkpoints: keep={keep} and every={every} must be at least 1")
        self.directory = epath.Path(directory).resolve()
        self.every = every
        self._async_bytes = async_gb * 1e9
        self._quiet = contextlib.ExitStack()
        self._quiet.enter_context(quiet_logs())
        # A save may fail at any time, while the training goes on in this thread.
        self._quiet.enter_context(quiet_failures())
        try:
            self._manager = make_writer(self.directory, keep)
        except OSError as error:
            self._quiet.close()
            raise UserError(f"checkpoint directory {self.directory}: {one_line(error)}") from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def steps(self) -> list[int]:
        """Steps of the checkpoints on disk or being written, oldest first; unverified."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Tree, meta: Meta, force: bool = False) -> bool:
        """Starts to write a checkpoint, or writes a large one; the arrays may be donated right after.

        Args:
          step: a multiple of ``every``, else nothing is done unless ``force``.
          state: any pytree of arrays.
          meta: JSON-able dict, saved together with ``step``.

        Returns:
          Whether a save was started; False also when this step is already there.

        Raises:
          UserError: when this or the previous save cannot be written (disk full, no permission).
        """
        due = force or self.every is None or step % self.every == 0
        if not due or step in self._manager.all_steps():
            return False
        content = [_json_value({**meta, "step": int(step)}), leaf_table(state)]
        record = {"meta": content[0], "leaves": content[1], "digest": digest(content)}
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / jax.process_count()
        stream = size > self._async_bytes
        kind = streamed if stream else ocp.args.StandardSave
        args = ocp.args.Composite(state=kind(state), meta=ocp.args.JsonSave(record))
        with self._write_errors():
            started = self._manager.save(step, args=args, force=True)
            if stream:
                self._manager.wait_until_finished()
            return started

    @contextlib.contextmanager
    def _write_errors(self) -> Iterator[None]:
        reason = None
        with quiet_failures():
            try:
                yield
            except (MemoryError, jax.errors.JaxRuntimeError):
                raise
            except Exception as error:
                # TensorStore reports a full disk as ValueError, other stores as other classes.
                reason = one_line(error)
            if reason is not None:
                await_debris(seconds=0.5)  # Orbax may keep the rest until it is closed.
        if reason is not None:
            raise UserError(
                f"a checkpoint in {self.directory} could not be written ({reason}); "
                "is the disk full? The complete ones were left alone",
                abrupt=True,  # Orbax's other threads wait for minutes for files that will not come.
            )

    def restore_latest(
        self, abstract_state: Tree, expect_meta: Meta | None = None, donate: bool = False
    ) -> tuple[Tree, Meta] | None:
        """The newest whole checkpoint, bit for bit as saved, placed as ``abstract_state`` says.

        A damaged checkpoint is named in a warning on stderr and the one before is used; the damaged
        one is then renamed to ``STEP.damaged`` to make way for the run's next saves.

        Args:
          abstract_state: tree of ShapeDtypeStructs with shardings (or of arrays); any mesh. Without
            a sharding a leaf goes to the first local device.
          expect_meta: keys that the checkpoint's meta must have with equal values; nested dicts are
            compared whole.
          donate: frees the arrays of ``abstract_state`` before reading, so that no device must hold
            two states.

        Returns:
          (state, meta), or None when the directory has no checkpoint at all.

        Raises:
          UserError: meta or leaves that do not fit, naming them; or checkpoints of which none is
            whole, naming the directory.
        """
        self.wait()
        target = jax.tree.map(_abstract, abstract_state)
        args = ocp.args.Composite(state=restore_args(target))

        def attempt(step: int) -> tuple[Tree, Meta]:
            record = _read_record(reader, step)
            where = f"checkpoint {self.directory / str(step)}"
            _check_meta(where, expect_meta or {}, record["meta"])
            _check_leaves(where, describe(target), record["leaves"])
            for leaf in jax.tree.leaves(abstract_state) if donate else ():
                leaf.delete()
            state = read(reader, step, args)["state"]
            _verify(record["leaves"], state)
            return state, record["meta"]

        with open_reader(self.directory, target) as reader:
            result, damaged = _newest_whole(reader, self.directory, attempt)
        self._set_aside(damaged)
        return result

    def _set_aside(self, steps: list[int]) -> None:
        if not steps:
            return
        if jax.process_index() == 0:
            for step in steps:
                taken = len(list(self.directory.glob(f"{step}.damaged*")))
                name = f"{step}.damaged" + (f".{taken}" if taken else "")
                (self.directory / str(step)).rename(self.directory / name)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("sprint_jax.checkpoint.set_aside")
        self._manager.reload()

    def wait(self) -> None:
        """Waits until the last save is complete; raises UserError if it could not be written."""
        with self._write_errors():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then frees threads; nothing else may be called afterwards."""
        try:
            with self._write_errors():
                self._manager.close()
        finally:
            self._quiet.close()


def _newest_whole(
    manager: ocp.CheckpointManager,
    directory: epath.Path,
    attempt: Callable[[int], tuple[Tree, Meta]],
    only: int | None = None,
) -> tuple[tuple[Tree, Meta] | None, list[int]]:
    """Result of the first attempt, newest first, that finds no damage; and the damaged steps."""
    steps = sorted(manager.all_steps(), reverse=True)
    if only is not None:
        if only not in steps:
            raise UserError(f"{directory} has no checkpoint of step {only}; it has {steps[::-1]}")
        steps = [only]
    damaged = []
    for step in steps:
        try:
            return attempt(step), damaged
        except Damaged as error:
            _warn(f"checkpoint {directory / str(step)} is damaged and not used: {error}")
            damaged.append(step)
    if damaged:
        raise UserError(
            f"{directory}: none of the checkpoints {damaged[::-1]} is whole (see the warnings); "
            "put a good copy there, or start anew in another --workdir"
        )
    return None, []


def _nested(leaves: dict[str, Any], field: str) -> Tree:
    """The subtree ``field`` of a table of leaves as nested dicts of ShapeDtypeStructs."""
    tree: dict[str, Any] = {}
    for name, entry in leaves.items():
        if name.startswith(f"{field}/"):
            *keys, last = name.split("/")[1:]
            node = tree
            for key in keys:
                node = node.setdefault(key, {})
            node[last] = jax.ShapeDtypeStruct(tuple(entry["shape"]), jnp.dtype(entry["dtype"]))
    return tree


def load_params(
    workdir: str,
    which: str = "ema",
    step: int | None = None,
    shardings: Tree | Callable[[Tree], Tree] | None = None,
) -> tuple[Tree, Meta]:
    """Parameters of a trained model from its workdir; the rest of the state is not read.

    Changes nothing on disk, so that it may run beside the training.

    Args:
      workdir: the training's --workdir.
      which: 'ema' (the average) or 'raw' (the trained parameters themselves).
      step: a certain checkpoint; None: the newest whole one (a damaged one is named on stderr).
      shardings: where the leaves go: one Sharding, a tree (or tree prefix) of them, or a function
        from the tree of ShapeDtypeStructs to one of these; None: the first local device.

    Returns:
      (nested dict of jax arrays with the saved dtypes, meta with key ``step``).

    Raises:
      UserError: not a workdir, no such checkpoint or parameters, or none whole.
    """
    if which not in ("ema", "raw"):
        raise UserError(f"params {which!r} is not known; choose 'ema' or 'raw'", exit_code=2)
    field = "params" if which == "raw" else "ema"
    directory = epath.Path(workdir).resolve() / "checkpoints"
    if not directory.is_dir():
        raise UserError(f"{workdir} is not a training workdir: it has no directory checkpoints")

    def attempt(chosen: int) -> tuple[Tree, Meta]:
        record = _read_record(reader, chosen)
        tree = _nested(record["leaves"], field)
        if not tree:
            raise UserError(f"checkpoint {directory / str(chosen)} has no {which} parameters")
        wanted = shardings(tree) if callable(shardings) else shardings
        if wanted is not None:
            tree = jax.tree.map(_abstract, tree, jax.tree.broadcast(wanted, tree))
        item = {field: jax.tree.map(_abstract, tree)}
        args = ocp.args.Composite(state=restore_args(item))
        with open_reader(directory, item) as arrays:
            params = read(arrays, chosen, args)["state"][field]
        _verify(record["leaves"], params, prefix=f"{field}/")
        return params, record["meta"]

    with quiet_logs(), open_reader(directory) as reader:
        result, _ = _newest_whole(reader, directory, attempt, only=step)
    if result is None:
        raise UserError(f"{directory} has no complete checkpoint yet; train longer")
    return result
