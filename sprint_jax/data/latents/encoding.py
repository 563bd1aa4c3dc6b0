"""The encoding of a source into a folder of latents, by one process or by several."""

import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ...core.config import Config
from ...core.errors import UserError
from ...core.progress import Progress
from ...core.storage import AnyPath
from ...encoders.conditions import open_conditions
from ...encoders.load import load_encoders
from ...parallel.sharding import batch_ways, make_mesh
from ..buckets import check_factor, choose_sizes
from ..sources.records import Source
from . import manifest
from .cache import MANIFEST, open_cache
from .latent_sheet import draw_latents
from .units import Job, encode_units, read_unit

PREVIEW = "preview.png"
VISIBLE_SECONDS = 60.0  # until a file that one host wrote must be there for another


def make_job(c: Config, source: Source, folder: AnyPath, limit: int | None) -> Job:
    """Makes the job that a config describes, of at most ``limit`` records; loads the encoders on this host.

    Raises:
      UserError: exit code 2 for options that cannot be, before anything large is read.
    """
    e = c.encode
    mesh = make_mesh(c.mesh.data, c.mesh.fsdp, c.mesh.tensor, devices=jax.local_devices())
    ways = batch_ways(mesh)
    for key in ("batch_size", "text_batch_size", "unit", "threads"):
        factor = ways if "batch" in key else 1  # the devices that share a batch
        if e[key] < 1 or e[key] % factor:
            raise UserError(f"encode.{key} is {e[key]}: give a positive multiple of {factor}", 2)
    sizes = choose_sizes(c.data.resolution, c.data.sizes, c.data.most_sizes)
    count = min(len(source), limit or len(source))
    if not count:
        raise UserError(f"{source.name} has no record")
    dtype = jnp.dtype(e.dtype)
    how = dict(text_batch_size=e.text_batch_size, style=c.data.prompt_style)
    encoders = load_encoders(c.data.encoders, dtype, mesh, **how)
    encoders = encoders._replace(conditions=open_conditions(c.data, dtype, mesh))
    check_factor(sizes, encoders.autoencoder.factor)
    return Job(folder, source, count, encoders, sizes, dtype, e.unit, e.batch_size, e.threads)


def encode(job: Job, *, sigma_d: float, max_rejected: float, peers: Any = None) -> None:
    """Encodes this process' share of a job, or the rest of it after an interruption.

    Args:
      sigma_d: see `manifest.finish`; max_rejected: the largest share of records that may be unusable.
      peers: the other processes, `parallel.peers.Peers`.
    """
    folder, main = job.folder, jax.process_index() == 0
    meet = peers.meet if peers is not None else lambda name: None
    plan = manifest.describe_job(job)
    begun = manifest.check_plan(folder, plan)
    if begun and (folder / MANIFEST).is_file() and (folder / PREVIEW).is_file():
        try:
            _report(open_cache(folder).manifest, folder, "is done already")
            return
        except UserError as error:
            print(f"{error}; encoding what is missing", file=sys.stderr, flush=True)
    meet("encode/checked")
    if main:
        manifest.begin(folder, plan)
    meet("encode/begun")
    message = f"--out {folder} is not what process 0 began: all hosts must see one folder"
    _wait_for(lambda: manifest.check_plan(folder, plan), message)

    started = time.monotonic()
    encoded = _encode_share(job, max_rejected, peers)
    meet("encode/encoded")
    if main:
        message = f"{folder} lacks some of {job.units} units: do all hosts see it? Run it again"
        entries = _wait_for(lambda: _read_all(job), message)
        manifest.check_rejected(job, entries, job.count, max_rejected)
        made = manifest.finish(job, entries, sigma_d)
        draw_latents(folder / PREVIEW, open_cache(folder), job, entries)
        rate = encoded * jax.process_count() / (time.monotonic() - started)
        _report(made, folder, f"is done, at {rate:.3g} images/s" if encoded else "is done")
    meet("encode/written")


def _encode_share(job: Job, max_rejected: float, peers: Any) -> int:
    """Encodes the units that are left of this process' share; returns the number of their records.

    Unit u is that of process ``u % n``. The number of processes may change from run to run: a unit that is done
    is done, whoever did it.
    """
    mine = range(jax.process_index(), job.units, jax.process_count())
    read = {unit: read_unit(job.folder, unit) for unit in mine}
    todo = [unit for unit, entry in read.items() if entry is None]
    entries = [entry for entry in read.values() if entry is not None]
    total, left = (sum(len(job.records(unit)) for unit in units) for units in (mine, todo))
    through = total - left
    if entries and jax.process_index() == 0:
        print(f"goes on in {job.folder}: {through} of {total} records are done", flush=True)

    def check() -> None:
        if jax.process_count() == 1:  # of several, each sees its own part alone
            seen = sum(len(job.records(entry["unit"])) for entry in entries)
            manifest.check_rejected(job, entries, seen, max_rejected)

    check()
    with Progress(total, through, unit="image") as progress:

        def advance(count: int) -> None:
            nonlocal through
            through += count
            progress.update(through)
            if peers is not None:
                peers.at_step(through)

        for entry in encode_units(job, todo, advance):
            entries.append(entry)
            check()
    return left


def _read_all(job: Job) -> list[dict[str, Any]]:
    """The entries of all units; empty as long as one is missing."""
    entries = [read_unit(job.folder, unit) for unit in range(job.units)]
    return [] if None in entries else entries


def _wait_for(find: Callable[[], Any], message: str) -> Any:
    """Waits for what other processes wrote: file systems of several hosts may need a moment to show it."""
    deadline = time.monotonic() + (VISIBLE_SECONDS if jax.process_count() > 1 else 0)
    while not (found := find()):
        if time.monotonic() > deadline:
            raise UserError(message)
        time.sleep(1.0)
    return found


def _report(made: dict[str, Any], folder: AnyPath, how: str) -> None:
    size = sum(shard["bytes"] for shard in made["shards"]) / 1e9
    buckets = len(made["buckets"])
    print(
        f"{folder} {how}: {made['records']} records with {made['captions']} captions in {buckets} "
        f"bucket{'s' * (buckets > 1)}, {size:.3g} GB; {made['rejected']} rejected"
    )
    print(made["latents"]["in_words"], flush=True)
