"""Encodes images and captions once, for many trainings: latents and text features of any data set.

    python -m sprint_jax.encode --config configs/encode.py:1024 --config.data.images=DIR \
        --config.data.encoders=HUB_ID --out LATENTS
    python -m sprint_jax.encode --config configs/encode.py:digits --out LATENTS

The same line begins, goes on after an interruption, or reports that all is done. LATENTS gets ArrayRecord
shards, manifest.json (which makes them one data set: without it nothing reads them), rejected.jsonl,
preview.png and one file for each unit that is done. Several processes with --distributed share the
units of one folder, which all of them must see.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from .core import cli
from .core.config import Config
from .core.errors import UserError
from .core.progress import Progress
from .data.buckets import check_factor, choose_sizes
from .data.latents import manifest
from .data.latents.cache import open_cache
from .data.latents.latent_sheet import draw_latents
from .data.latents.units import Job, encode_units, process_units, read_unit
from .data.sources.open import Concatenation, open_images
from .data.sources.records import Source
from .encoders.load import load_encoders
from .parallel import distributed
from .parallel.peers import Peers
from .parallel.sharding import batch_ways, make_mesh

PREVIEW = "preview.png"
VISIBLE_SECONDS = 60.0  # until what one host wrote must be there for another


def main(argv: list[str]) -> None:
    """The command; ``argv`` are its words. Raises UserError for what cannot be encoded."""
    parser = cli.make_parser("encode", __doc__)
    cli.add_config(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="made, or gone on with")
    parser.add_argument(
        "--limit", type=int, metavar="N", help="only the first N records, to try it"
    )
    distributed.add_flags(parser)
    flags, c = cli.parse_with_config(parser, argv)
    if flags.limit is not None and flags.limit < 1:
        raise UserError(f"--limit {flags.limit} must be at least 1", exit_code=2)
    _check_outside(Path(flags.out), c.data.images)
    cli.use_compilation_cache()
    with distributed.joined(flags) as peers:
        run(c, open_source(c), Path(flags.out), limit=flags.limit, peers=peers)


def _check_outside(out: Path, images: Sequence[str]) -> None:
    """Refuses to write into a folder of images, where the preview would be one of them."""
    for path in images:
        if Path(path).is_dir() and out.resolve().is_relative_to(Path(path).resolve()):
            raise UserError(f"--out {out} lies in the images of {path}: give a folder elsewhere", 2)


def open_source(c: Config) -> Source:
    """The records that ``data.images`` names, one source after the other."""
    if not c.data.images:
        raise UserError("data.images is empty: name folders, tars, record files or data sets", 2)
    features = dict(image_feature=c.data.image_feature, caption_feature=c.data.caption_feature)
    return Concatenation(open_images(c.data.images, data_dir=c.data.dir, **features))


def run(
    c: Config, source: Source, folder: Path, *, limit: int | None = None, peers: Peers | None = None
) -> None:
    """Encodes a source into a folder, this process' share of it, and the rest of an earlier run.

    Args:
      c: sections ``data``, ``encode`` and ``mesh``, and ``sigma_d``.
      limit: only so many records.
      peers: the other processes.

    Raises:
      UserError: see `data.latents.units`, `data.latents.manifest`, `encoders.load` and `data.buckets`.
    """
    job = make_job(c, source, folder, limit)
    plan = manifest.describe_job(job)
    begun = manifest.check_plan(folder, plan)
    if begun and manifest.is_complete(folder) and (folder / PREVIEW).exists():
        try:
            _report(open_cache(folder).manifest, folder, "is done already")
            return
        except UserError as error:
            print(f"{error}; encoding what is missing", file=sys.stderr, flush=True)
    _meet(peers, "checked")
    if jax.process_index() == 0:
        manifest.begin(folder, plan)
    _meet(peers, "begun")
    _wait_for_plan(folder, plan)

    began = time.monotonic()
    encoded = _encode_share(job, c.data.max_rejected, peers)
    _meet(peers, "encoded")
    if jax.process_index() == 0:
        entries = _all_units(job)
        manifest.check_rejected(entries, job.count, c.data.max_rejected, folder, job.count)
        made = manifest.finish(job, entries, c.sigma_d)
        cache = open_cache(folder)
        draw_latents(folder / PREVIEW, cache, source, job.encoders, job.sizes, entries)
        rate = encoded * jax.process_count() / (time.monotonic() - began)
        _report(made, folder, f"is done, at {rate:.3g} images/s" if encoded else "is done")
    _meet(peers, "written")


def make_job(c: Config, source: Source, folder: Path, limit: int | None) -> Job:
    """What is to be done, with the encoders loaded on the devices of this host.

    Raises:
      UserError: exit code 2 for options that cannot be, before anything large is read.
    """
    e = c.encode
    for key in ("batch_size", "text_batch_size", "unit", "threads"):
        if e[key] < 1:
            raise UserError(f"encode.{key} is {e[key]}: give at least 1", exit_code=2)
    if e.dtype not in ("bfloat16", "float32"):
        raise UserError(f"encode.dtype is '{e.dtype}': give bfloat16 or float32", exit_code=2)
    sizes = choose_sizes(c.data.resolution, c.data.sizes)
    mesh = make_mesh(c.mesh.data, c.mesh.fsdp, c.mesh.tensor, devices=jax.local_devices())
    for key in ("batch_size", "text_batch_size"):
        if e[key] % batch_ways(mesh):
            raise UserError(
                f"encode.{key} {e[key]} is not a multiple of the {batch_ways(mesh)} devices that share it",
                exit_code=2,
            )
    count = min(len(source), limit or len(source))
    if not count:
        raise UserError(f"{source.name} has no record")
    dtype = jnp.dtype(e.dtype)
    encoders = load_encoders(c.data.encoders, dtype, mesh, text_batch_size=e.text_batch_size)
    check_factor(sizes, encoders.autoencoder.factor)
    return Job(folder, source, count, encoders, sizes, dtype, e.unit, e.batch_size, e.threads)


def _encode_share(job: Job, max_rejected: float, peers: Peers | None) -> int:
    """Encodes what is left of this process' units; returns how many records that were."""
    todo, entries = process_units(job)
    total = sum(len(job.records(unit)) for unit in todo)
    seen = sum(len(job.records(entry["unit"])) for entry in entries)
    start = seen
    if jax.process_count() == 1:
        manifest.check_rejected(entries, seen, max_rejected, job.folder, job.count)
    if seen and jax.process_index() == 0:
        print(f"goes on in {job.folder}: {seen} of {seen + total} records are done", flush=True)
    with Progress(start + total, start, unit="image") as progress:
        through = start

        def advance(count: int) -> None:
            nonlocal through
            through += count
            progress.update(through)
            if peers is not None:
                peers.at_step(through)

        for entry in encode_units(job, todo, advance):
            entries.append(entry)
            seen += len(job.records(entry["unit"]))
            if jax.process_count() == 1:  # of several, each sees its own part alone
                manifest.check_rejected(entries, seen, max_rejected, job.folder, job.count)
    return total


def _wait_for_plan(folder: Path, plan: dict[str, Any]) -> None:
    """Waits until this host sees the folder that process 0 has begun; a file system may take its time."""
    deadline = time.monotonic() + VISIBLE_SECONDS
    while not (folder / manifest.PLAN).exists():
        if time.monotonic() > deadline:
            raise UserError(
                f"--out {folder} is not what process 0 began: all hosts must see one folder"
            )
        time.sleep(1.0)
    manifest.check_plan(folder, plan)


def _all_units(job: Job) -> list[dict[str, Any]]:
    """What all processes wrote, by unit; file systems of several hosts may need a moment to show it."""
    deadline = time.monotonic() + VISIBLE_SECONDS
    while True:
        entries = [read_unit(job.folder, unit) for unit in range(job.units)]
        missing = [unit for unit, entry in enumerate(entries) if entry is None]
        if not missing:
            return entries
        if time.monotonic() > deadline or jax.process_count() == 1:
            raise UserError(
                f"{job.folder} lacks {len(missing)} of {job.units} units, the first is {missing[0]}: do "
                "all hosts see one folder? Run it again"
            )
        time.sleep(1.0)


def _meet(peers: Peers | None, name: str) -> None:
    if peers is not None:
        peers.meet(f"encode/{name}")


def _report(made: dict[str, Any], folder: Path, how: str) -> None:
    size = sum(shard["bytes"] for shard in made["shards"]) / 1e9
    buckets = len(made["buckets"])
    print(
        f"{folder} {how}: {made['records']} records with {made['captions']} captions in {buckets} "
        f"bucket{'s' * (buckets > 1)}, {size:.3g} GB; {made['rejected']} rejected"
    )
    print(made["latents"]["in_words"], flush=True)


if __name__ == "__main__":
    cli.run_command(main)
