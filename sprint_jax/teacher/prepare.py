"""The preparation of a teacher: surgery and pruning of a network, written as a diffusers folder."""

import contextlib
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ..checkpoints.weights import Weights, find_weights
from ..core.config import Config
from ..core.errors import UserError
from ..core.files import differences, read_json, write_json_atomic
from ..core.fingerprint import fingerprint
from ..core.storage import AnyPath, absolute, as_path, in_bucket, local_output
from ..data import feed
from ..interop.diffusers import save_transformer
from ..models.sana import from_fields
from ..parallel.sharding import make_mesh, same_everywhere, state_shardings, to_devices
from ..training import setup
from . import pruning, surgery

RECORD = "prepared.json"
VISIBLE_SECONDS = 60.0  # until a file of one host must be there for another
PROBE_BATCHES, PROBE_TIMES = 2, 8  # of the data, to measure the importance of blocks


class Options(NamedTuple):
    """Words of the command that decide the result; prepared.json holds them.

    Attributes:
      model: path of the source, for `weights.find_weights`.
      prune: blocks to keep, or 0 for all; protect: so many at either end stay.
      keep_time_embedding: keep its weights where the time scale changes, instead of fitting new ones.
      timestep_scale: of a source that does not say it.
    """

    model: str
    prune: int = 0
    protect: int = 1
    keep_time_embedding: bool = False
    timestep_scale: float = 1.0


def prepare(c: Config, options: Options, folder: AnyPath, peers: Any = None) -> None:
    """Writes ``folder``, whole or not at all; one that the same options made is left as it is.

    Args:
      peers: the processes of the run, `parallel.peers.Peers`; all call this together, and process 0 writes.

    Raises:
      UserError: the source does not fit, or the folder was made with other options.
    """
    if (path := as_path(options.model)).exists():
        options = options._replace(model=str(absolute(path)))
    there = (folder / RECORD).is_file() if in_bucket(folder) else folder.is_dir()
    if same_everywhere(np.asarray(there)):
        _check_same(folder, options)
        if jax.process_index() == 0:
            print(f"{folder} is there already; going on from it", flush=True)
        return
    if options.prune and jax.process_count() > 1:
        raise UserError(
            f"--prune is for one process, and {folder} is not there yet: make it with --surgery_only and "
            "without --distributed, then give this line again",
            exit_code=2,
        )
    # Checkpoints are read by all processes together; what else there is, by the first alone.
    if jax.process_index() == 0 or (as_path(options.model) / "checkpoints").is_dir():
        _operate(c, options, folder)
    if peers is not None:
        peers.meet("prepared the teacher")
    _wait_for(folder / RECORD)


def _wait_for(path: AnyPath) -> None:
    """Waits for what another process wrote: the disk of a network may need a moment to show it."""
    deadline = time.monotonic() + VISIBLE_SECONDS
    while not path.is_file():
        if time.monotonic() > deadline:
            raise UserError(f"{path} of process 0 is not seen here: all hosts must see one folder")
        time.sleep(1.0)


def _operate(c: Config, options: Options, folder: AnyPath) -> None:
    """Reads the source on this process' devices and, if it is the first, writes the folder."""
    target = dict(c.model)
    source = find_weights(options.model, target | {"timestep_scale": options.timestep_scale})
    if not source.is_teacher:
        raise UserError(f"--model {options.model} is a student: it embeds guidance")
    surgery.check_fits(options.model, source.fields, target, options.prune)
    alone = jax.process_count() == 1
    mesh = setup.mesh_from(c) if alone else make_mesh(1, -1, devices=jax.local_devices())
    params, step = source.load(lambda tree: state_shardings(mesh, tree))
    if jax.process_index():
        return
    for name in ("logvar_linear", "control"):  # a teacher is prepared without its control branch
        params.pop(name, None)
    source = source._replace(fields=source.fields | {"control_blocks": 0})
    record = {"options": options._asdict(), "kind": source.kind, "step": step}
    record["hash"] = fingerprint(params)
    with _made(folder) as partial:
        _write(c, options, source, params, mesh, record, partial)
    print(f"{folder}: {'; '.join(record['changes']) or 'nothing to change'}", flush=True)


@contextlib.contextmanager
def _made(folder: AnyPath) -> Iterator[Path]:
    """A folder to write into, which becomes ``folder`` at the end."""
    if in_bucket(folder):
        with local_output(folder, (RECORD,)) as local:
            yield local
        return
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    partial.replace(folder)


def _write(
    c: Config, options: Options, source: Weights, params: Any, mesh, record: dict, partial: Path
) -> None:
    """Operates on the parameters of ``source``, and writes them and the completed record."""
    target = dict(c.model)
    fields, changes = source.fields, []
    if options.prune and options.prune < from_fields(fields).num_layers:
        fields, params, found = _prune(c, options, source, params, mesh, partial)
        record |= found
        changes.append(f"blocks {', '.join(map(str, found['kept']))} kept")
    fit_time = not options.keep_time_embedding
    params, more = surgery.operate(fields, params, target, fit_time=fit_time)
    record["changes"] = changes + more
    save_transformer(partial, target, params)
    write_json_atomic(partial / RECORD, record)


def _prune(
    c: Config, options: Options, source: Weights, params: Any, mesh: jax.sharding.Mesh, folder: Path
) -> tuple[dict, Any, dict]:
    """Returns fields and parameters of the most important blocks, and importance and choice for the record."""
    data = feed.open_data(c, mesh)
    batches = [to_devices(mesh, data.batches(i)) for i in range(PROBE_BATCHES)]
    print(f"measuring the importance of {from_fields(source.fields).num_layers} blocks", flush=True)
    model = from_fields(source.fields, dtype=c.model.dtype)
    importance = pruning.block_importance(model, params, batches, PROBE_TIMES)
    kept = pruning.choose_blocks(importance, options.prune, options.protect)
    pruning.draw_importance(folder / "importance.png", importance, kept)
    fields, params = pruning.prune_blocks(source.fields, params, kept)
    return fields, params, {"importance": importance.tolist(), "kept": list(kept)}


def _check_same(folder: Path, options: Options) -> None:
    old = read_json(folder / RECORD).get("options", {})
    for name, before, now in differences(old, options._asdict()):
        raise UserError(
            f"{folder} was made with --{name} {before}, not {now}: use another --workdir"
        )
