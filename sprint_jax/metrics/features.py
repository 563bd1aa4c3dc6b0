"""Features of many pictures or sentences: computed in parts, kept on disk, shared by processes, resumed."""

import dataclasses
import io
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn

from ..core.errors import UserError
from ..core.files import write_atomic
from ..core.fingerprint import digest, fingerprint
from ..core.progress import Progress
from ..core.storage import AnyPath, make_folder
from ..parallel.sharding import batch_sharding, batch_ways, make_mesh, replicated
from .pictures import Pictures
from .preprocess import View, apply

PART = 256  # rows of a file


class Inputs(NamedTuple):
    """Rows for a network: ``read(i)`` is one, and ``identity``, JSON-able, holds all that they depend on."""

    count: int
    read: Callable[[int], np.ndarray]
    identity: Any


class Network(NamedTuple):
    """A pure function ``apply(params, rows) -> [B, D]``, its parameters, and all that its numbers depend on.

    ``weights`` is their fingerprint; ``fields``, JSON-able, are those of the module: with equal parameters
    another number of heads or another activation makes other features.
    """

    name: str
    apply: Callable[[Any, jax.Array], jax.Array]
    params: Any
    weights: str
    fields: dict[str, Any]


class Timing(NamedTuple):
    """What extraction took: rows computed, seconds in all, seconds that the network waited for rows."""

    rows: int
    seconds: float
    waiting: float


def make_network(name: str, apply: Callable, params: Any, model: nn.Module) -> Network:
    """Makes a `Network`, and takes its fingerprint and the fields of its module."""
    names = [each.name for each in dataclasses.fields(model) if each.name not in ("parent", "name")]
    return Network(
        name, apply, params, fingerprint(params), {each: getattr(model, each) for each in names}
    )


def view_pictures(pictures: Pictures, view: View) -> Inputs:
    """Returns pictures as a network sees them."""
    identity = [pictures.stamp, view._asdict()]
    return Inputs(len(pictures.names), lambda i: apply(view, pictures.read(i)), identity)


def list_rows(rows: np.ndarray) -> Inputs:
    """Returns rows that are in memory, such as tokens."""
    return Inputs(len(rows), rows.__getitem__, [rows.shape, digest(rows.tolist())])


def extract(
    network: Network,
    inputs: Inputs,
    folder: AnyPath,
    *,
    batch: int = 32,
    threads: int = 8,
    peers: Any = None,
    label: str = "",
) -> tuple[np.ndarray, Timing]:
    """Computes the features of all rows, or reads those that are on disk.

    Part n is that of process ``n % processes`` and appears as a file when it is whole, so that a killed run
    goes on where it was. Batches are split over the devices of a process, by any number of which a row's
    features are the same up to rounding. Every process must call it, and gets all features.

    Args:
      folder: where parts lie, in a folder of their own for these weights and inputs; seen by all processes.
      batch: rows at once; rounded up to a multiple of the devices.
      threads: that read rows while the network runs.
      peers: the other processes, `parallel.peers.Peers`.
      label: of this call among those of a run.

    Returns:
      [count, D] float32, and what it took.

    Raises:
      UserError: what another process computed is not seen here.
    """
    identity = [network.weights, network.fields, inputs.identity, PART]
    place = folder / f"{network.name}-{digest(identity)[:16]}"
    make_folder(place)
    parts = range(-(-inputs.count // PART))
    mine = [part for part in parts[jax.process_index() :: jax.process_count()]]
    todo = [part for part in mine if _read(place, part, inputs.count) is None]
    timing = Timing(0, 0.0, 0.0)
    if todo:
        timing = _compute(network, inputs, place, todo, batch, threads, peers)
    if peers is not None:
        peers.meet(f"features/{label}/{place.name}")
    found = [_read(place, part, inputs.count) for part in parts]
    if any(rows is None for rows in found):
        missing = next(part for part, rows in zip(parts, found, strict=True) if rows is None)
        raise UserError(f"{place / _name(missing)} is missing: do all hosts see this folder?")
    return np.concatenate(found), timing


def _compute(network, inputs, place, todo, batch, threads, peers) -> Timing:
    mesh = make_mesh(devices=jax.local_devices())
    batch = -(-batch // batch_ways(mesh)) * batch_ways(mesh)
    params = jax.device_put(network.params, replicated(mesh))
    run = jax.jit(network.apply)
    rows = [range(part * PART, min((part + 1) * PART, inputs.count)) for part in todo]
    cuts = [
        (n, each[i : i + batch]) for n, each in enumerate(rows) for i in range(0, len(each), batch)
    ]
    total, done, waited, began = sum(map(len, rows)), 0, 0.0, time.perf_counter()
    kept: dict[int, list[np.ndarray]] = {}
    with ThreadPoolExecutor(threads) as pool, Progress(total, unit="row") as progress:
        ahead = [[pool.submit(inputs.read, i) for i in cut] for _, cut in cuts[:2]]
        for turn, (part, cut) in enumerate(cuts):
            if turn + 2 < len(cuts):
                ahead.append([pool.submit(inputs.read, i) for i in cuts[turn + 2][1]])
            before = time.perf_counter()
            block = np.stack([each.result() for each in ahead.pop(0)])
            waited += time.perf_counter() - before
            # Filled up with the last row: one program does for all.
            block = block[np.minimum(np.arange(batch), len(cut) - 1)]
            with jax.default_matmul_precision("float32"):
                features = run(params, jax.device_put(block, batch_sharding(mesh)))
            kept.setdefault(part, []).append(np.asarray(features, np.float32)[: len(cut)])
            done += len(cut)
            progress.update(done)
            if peers is not None:
                peers.at_step(done)
            if cut[-1] == rows[part][-1]:
                content = io.BytesIO()
                np.save(content, np.concatenate(kept.pop(part)))
                write_atomic(place / _name(todo[part]), content.getvalue())
    return Timing(total, time.perf_counter() - began, waited)


def _name(part: int) -> str:
    return f"part-{part:05d}.npy"


def _read(place: AnyPath, part: int, count: int) -> np.ndarray | None:
    """Returns a part that is there and whole, else None."""
    try:
        rows = np.load(io.BytesIO((place / _name(part)).read_bytes()), allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return rows if len(rows) == min(PART, count - part * PART) else None
